//! Compiles the C++ shim against the libtorch that `torch-sys` was built with.

use std::env;
use std::path::{Path, PathBuf};

const AVX512: [&str; 5] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // Lints link nothing, and cargo keeps what it builds for them apart: the C++ would be compiled a second time.
    if env::var_os("CLIPPY_ARGS").is_some() {
        return;
    }
    let lib_dir = libtorch_lib_dir();
    let include = lib_dir.parent().unwrap_or(Path::new("/")).join("include");

    compile_shim(&include);

    cpp().file("csrc/kernels/dispatch.cpp").compile("torchx_kernels");
    compile_kernels("baseline", &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        compile_kernels("avx2", &["-mavx2"]);
        compile_kernels("avx512", &AVX512);
    }

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

/// Optimised in every profile: the tests run tensors of real sizes.
fn cpp() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).define("_GLIBCXX_USE_CXX11_ABI", "1").include("csrc");
    build
}

/// Everything that sees libtorch, as one file: its headers take far longer to read than all of this to compile. The Gloo backend's header names
/// types of gloo, whose own headers no wheel has: `gloo_headers/` declares them.
fn compile_shim(include: &Path) {
    let root = env::current_dir().expect("cargo runs this in the crate's folder");
    let files = [sources("csrc"), sources("csrc/dist")].concat();
    let lines: String = files.iter().map(|file| format!("#include \"{}\"\n", root.join(file).display())).collect();
    let all = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("shim.cpp");
    std::fs::write(&all, lines).expect("OUT_DIR can be written");
    cpp()
        .file(all)
        .include("csrc/dist/gloo_headers")
        .define("USE_C10D_GLOO", None)
        .flag("-isystem")
        .flag(include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .flag("-fopenmp")
        .compile("torchx_shim");
}

/// One instruction set's kernels; `csrc/kernels/kernels.h` says why they are compiled apart and without contraction.
fn compile_kernels(isa: &str, flags: &[&str]) {
    cpp()
        .file(format!("csrc/kernels/{isa}.cpp"))
        .opt_level(3)
        .flags(["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"])
        // Vectors wider than the baseline's registers never cross a call: everything is inlined. GCC 12 takes the
        // don't-care operand inside its own AVX-512 intrinsics for an uninitialised variable.
        .flags(["-Wno-psabi", "-Wno-maybe-uninitialized"])
        .flags(flags)
        .compile(&format!("torchx_kernels_{isa}"));
}
