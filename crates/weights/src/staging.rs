//! Files and directories that appear whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::WeightsError;

/// Writes a file beside its place, syncs it and renames it.
pub(crate) fn write_file(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), WeightsError>,
) -> Result<(), WeightsError> {
    let partial = Partial { path: sibling(path, "partial")?, directory: false };
    let refused = |source: io::Error| WeightsError::Write { path: path.to_path_buf(), source };
    let mut file = File::create(&partial.path).map_err(refused)?;
    write(&mut file)?;
    file.sync_all().map_err(refused)?;
    fs::rename(&partial.path, path).map_err(refused)?;
    sync_directory(parent(path)).map_err(refused)
}

/// Fills a directory beside its place, then puts it there; what stands at `path` is replaced only at the end.
///
/// The caller has made sure that what stands at `path` may go.
pub(crate) fn write_directory(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), WeightsError>,
) -> Result<(), WeightsError> {
    let refused = |source: io::Error| WeightsError::Write { path: path.to_path_buf(), source };
    fs::create_dir_all(parent(path)).map_err(refused)?;
    let partial = Partial { path: sibling(path, "partial")?, directory: true };
    match fs::remove_dir_all(&partial.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
        _ => fs::create_dir(&partial.path).map_err(refused)?,
    }
    fill(&partial.path)?;
    sync_directory(&partial.path).map_err(refused)?;
    if path.exists() {
        let replaced = sibling(path, "replaced")?;
        fs::rename(path, &replaced).map_err(refused)?;
        if let Err(error) = fs::rename(&partial.path, path) {
            fs::rename(&replaced, path).map_err(refused)?;
            return Err(refused(error));
        }
        fs::remove_dir_all(&replaced).map_err(refused)?;
    } else {
        fs::rename(&partial.path, path).map_err(refused)?;
    }
    sync_directory(parent(path)).map_err(refused)
}

/// What is half written goes away when its writer fails; after the rename there is nothing left to remove.
struct Partial {
    path: PathBuf,
    directory: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        // A failure here has no one to tell: the writer's own error is on its way.
        let _ = if self.directory { fs::remove_dir_all(&self.path) } else { fs::remove_file(&self.path) };
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sibling(path: &Path, what: &str) -> Result<PathBuf, WeightsError> {
    let Some(name) = path.file_name() else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "the path has no last component");
        return Err(WeightsError::Write { path: path.to_path_buf(), source });
    };
    let name = format!(".{}.{}.{what}", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(name))
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
