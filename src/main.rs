use std::process::ExitCode;
use std::{env, thread};

use tokio::runtime::{Builder, Runtime};

/// A third of a node's time under load went into glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = portwarden::cli::parse();
    match runtime() {
        Ok(runtime) => runtime.block_on(portwarden::cli::run(cli)),
        Err(error) => {
            eprintln!("error: the runtime cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One core is left to the thread that writes the log, which each answer waits for, and to the kernel's
/// part of the network: docs/performance.md. tokio's own variable says otherwise.
fn runtime() -> std::io::Result<Runtime> {
    let mut runtime = Builder::new_multi_thread();
    if env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        runtime.worker_threads((cores - 1).max(1));
    }
    runtime.enable_all().build()
}
