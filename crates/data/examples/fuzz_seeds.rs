//! Writes the first inputs of scripts/fuzz: small files of each kind, below FOLDER/scan, FOLDER/image, FOLDER/caption.

#[path = "../tests/fixture/mod.rs"]
mod fixture;

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let Some(folder) = env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("usage: fuzz_seeds FOLDER"));
    };
    let write = |target: &str, seeds: Vec<Vec<u8>>| {
        let folder: &Path = &folder.join(target);
        fs::create_dir_all(folder)?;
        seeds.iter().enumerate().try_for_each(|(number, bytes)| fs::write(folder.join(format!("{number:02}")), bytes))
    };
    let images: Vec<Vec<u8>> = fixture::images().into_iter().map(|(_, bytes)| bytes).collect();
    let captions = fixture::CAPTIONS.map(|caption| caption.as_bytes().to_vec()).to_vec();
    write("scan", fixture::archives())?;
    write("caption", captions)?;
    write("image", images)
}
