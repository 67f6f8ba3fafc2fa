//! The `outhaul` program: see the library.

fn main() -> std::process::ExitCode {
    outhaul::cli::main()
}
