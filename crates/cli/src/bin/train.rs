//! The program `train`, which is `blip2 train`.

fn main() -> std::process::ExitCode {
    // Before any other call into libtorch, which remembers its first answer about CUDA.
    blip2_trainer::device::load_cuda();
    blip2_cli::train()
}
