//! Freed memory is kept. A program of its own, without the test harness, whose tests run beside the main thread.

use blip2_torchx::memory;
use tch::{Device, Kind, Tensor};

const MIB: u64 = 1 << 20;

fn main() {
    // As runners of tests ask for names.
    if std::env::args().any(|argument| argument == "--list") {
        if !std::env::args().any(|argument| argument == "--ignored") {
            println!("freed_memory_is_kept: test");
        }
        return;
    }
    let resident = || memory::rss_bytes().unwrap() / MIB;
    let use_and_free = || drop(Tensor::ones([256 << 20], (Kind::Uint8, Device::Cpu)));

    let start = resident();
    use_and_free();
    let given_back = resident();
    assert!(given_back < start + 64, "the C library keeps it by itself: {start}, then {given_back} MiB");

    memory::keep_freed();
    use_and_free();
    let kept = resident();
    assert!(kept > start + 240, "{start}, then {kept} MiB");
    use_and_free();
    let again = resident();
    assert!(again < kept + 16, "{kept}, then {again} MiB");
    println!("test freed_memory_is_kept ... ok");
}
