//! Compiles the C++ shim against the libtorch that `torch-sys` was built with.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let lib_dir = libtorch_lib_dir();
    let include = lib_dir.parent().unwrap_or(Path::new("/")).join("include");

    cpp(&include).files(sources("csrc")).compile("torchx_shim");

    println!("cargo:rustc-link-search=native={}", lib_dir.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    // at::parallel_for is a header: its OpenMP region must run on the very runtime that libtorch has loaded.
    if lib_dir.join("libgomp.so.1").exists() {
        println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
    } else {
        println!("cargo:rustc-link-lib=gomp");
    }
}

fn libtorch_lib_dir() -> PathBuf {
    env::var_os("DEP_TCH_LIBTORCH_LIB")
        .map(PathBuf::from)
        .or_else(|| env::var_os("LIBTORCH").map(|root| Path::new(&root).join("lib")))
        .expect("torch-sys passes DEP_TCH_LIBTORCH_LIB; run scripts/libtorch or set LIBTORCH")
}

fn sources(dir: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("csrc is part of the crate")
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
        .collect();
    files.sort();
    files
}

fn cpp(include: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-fopenmp")
        .flag("-isystem")
        .flag(include.display().to_string())
        .include("csrc");
    build
}
