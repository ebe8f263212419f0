//! The program `hostagent`: parse, run, exit status. What it does is in the library.

use std::process::ExitCode;

use clap::Parser as _;
use hostagent::cli::Cli;
use hostagent::commands::{self, Exit};

fn main() -> ExitCode {
    let exit = match Cli::try_parse() {
        Ok(cli) => commands::run(&cli),
        Err(e) => {
            // Help and version are asked for; everything else is wrong usage.
            let exit = if e.use_stderr() { Exit::Usage } else { Exit::Pass };
            // A terminal that went away leaves nobody to tell.
            drop(e.print());
            exit
        }
    };
    ExitCode::from(exit as u8)
}
