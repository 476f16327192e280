//! `ferry-lab`: the lab's command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::main() {
        Ok(code) => code,
        Err(error) => {
            lab::process::clean_up();
            eprintln!("ferry-lab: {error:#}");
            ExitCode::from(1)
        }
    }
}
