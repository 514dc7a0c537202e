//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// How the names of files begin that are being written; what a killed program leaves of them can be removed.
pub(crate) const UNFINISHED: &str = ".writing-";

/// Writes `path` through a temporary file in its folder, which is made where it is missing: synced, then renamed.
pub(crate) fn write<T>(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<T>) -> io::Result<T> {
    let (staged, result) = stage(path, fill)?;
    staged.replace()?;
    Ok(result)
}

/// Writes a file that is there whole or not at all, in the place of one that has its name.
///
/// # Errors
/// Whatever the system says, a full disk among it; what was there before stays.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, |out| out.write_all(bytes))
}

/// As [`write_file`] of JSON whose first key says `format`, where nothing else is in its place.
///
/// # Errors
/// As [`spare_foreign`] and [`write_file`].
pub(crate) fn write_own(path: &Path, format: &str, bytes: &[u8]) -> io::Result<()> {
    spare_foreign(path, format)?;
    write_file(path, bytes)
}

/// A file that is not of this format is somebody's, and not written over. What a crash left of one that is may go: its beginning, nothing, or zeros.
///
/// # Errors
/// Another file lies at `path`, or one that cannot be read.
pub(crate) fn spare_foreign(path: &Path, format: &str) -> io::Result<()> {
    let ours = format!("{{\"format\":\"{format}\"");
    let mut start = Vec::new();
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?.take(ours.len() as u64).read_to_end(&mut start)?,
    };
    if ours.as_bytes().starts_with(&start) || start.iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    Err(io::Error::other(format!("expected no file there or a {format}, got another one: move it away")))
}

/// Writes what `path` is to hold beside it, synced, and leaves the renaming to the caller.
pub(crate) fn stage<T>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<T>,
) -> io::Result<(Staged, T)> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = tempfile::Builder::new().prefix(UNFINISHED).permissions(mode()).tempfile_in(folder)?;
    let mut out = BufWriter::new(temporary.as_file());
    let result = fill(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    Ok((Staged { temporary, path: path.to_owned(), folder: folder.to_owned() }, result))
}

/// A file that is written and has not got its name yet; dropped, it is removed.
pub(crate) struct Staged {
    temporary: NamedTempFile,
    path: PathBuf,
    folder: PathBuf,
}

impl Staged {
    /// Its length in bytes.
    pub(crate) fn bytes(&self) -> io::Result<u64> {
        Ok(self.temporary.as_file().metadata()?.len())
    }

    /// Gives it its name, in place of a file that has it.
    pub(crate) fn replace(self) -> io::Result<()> {
        self.temporary.persist(&self.path).map_err(|error| error.error)?;
        File::open(self.folder)?.sync_all()
    }

    /// Gives it its name, which no file may have.
    pub(crate) fn create(self) -> io::Result<()> {
        self.temporary.persist_noclobber(&self.path).map_err(|error| error.error)?;
        File::open(self.folder)?.sync_all()
    }
}

/// What a file gets that is created the plain way; temporary files are private otherwise.
pub(crate) fn mode() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(0o644)
}
