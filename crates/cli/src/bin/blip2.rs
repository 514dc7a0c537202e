//! The program `blip2`.

fn main() -> std::process::ExitCode {
    // Before any other call into libtorch, which remembers its first answer about CUDA.
    blip2_trainer::device::load_cuda();
    blip2_cli::blip2()
}
