//! The `outhaul` program: see the library.

// Events and rows are many small values that are made on one thread and dropped on another, which the system's
// allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    outhaul::cli::main()
}
