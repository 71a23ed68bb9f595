//! `containerd-shim-keelson-v1`: started by containerd, see `keelson_shim`.

use std::io::Write;
use std::process::ExitCode;

use keelson_shim::options::Options;

fn main() -> ExitCode {
    let result = Options::parse(std::env::args().skip(1)).and_then(|options| keelson_shim::run(&options));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => {
            // containerd shows what a failed `start` or `delete` says here; there is nobody else to tell.
            writeln!(std::io::stderr(), "containerd-shim-keelson-v1: {words}").ok();
            ExitCode::FAILURE
        }
    }
}
