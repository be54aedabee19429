//! The `selfsup` program; all of it is in `selfsup::cli`.

fn main() -> std::process::ExitCode {
    selfsup::cli::main()
}
