use std::process::ExitCode;

/// A third of a node's time under load went into glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = portwarden::cli::parse();
    match portwarden::cli::runtime() {
        Ok(runtime) => runtime.block_on(portwarden::cli::run(cli)),
        Err(error) => {
            eprintln!("error: the runtime cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}
