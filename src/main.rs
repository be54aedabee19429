//! The `selfsup` program, implemented in `selfsup::cli`.

fn main() -> std::process::ExitCode {
    selfsup::cli::main()
}
