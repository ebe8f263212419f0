//! The command line of the lab, run as `cargo lab`; what there is to read stands in `lib.rs`.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lab::stage::Cuts;
use lab::{demo, host, image, package, runner, snapshot};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

/// Simulated EC2 instances in which hostagent is tested and shown.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Build the .deb; its path is the last line of the output
    Package {
        /// How to compile
        #[arg(long, value_enum, default_value = "release")]
        profile: package::Profile,
    },
    /// Run all tests and scenarios, or the scenarios whose name contains a FILTER
    Test {
        /// List the scenarios and run nothing
        #[arg(long)]
        list: bool,
        /// How many scenarios run side by side
        #[arg(long)]
        jobs: Option<usize>,
        /// Test this .deb instead of building one
        #[arg(long, value_name = "FILE")]
        deb: Option<PathBuf>,
        /// The Debian release of all instances, such as bookworm; by default each scenario's own
        #[arg(long, value_name = "NAME")]
        release: Option<String>,
        /// Show the journal, console and calls of scenarios that pass, too
        #[arg(long)]
        evidence: bool,
        /// How many times `power-cut` cuts the power
        #[arg(long, value_name = "N", default_value_t = 12)]
        times: usize,
        /// Cut at the moments that this number and those after it draw; random by default
        #[arg(long, value_name = "S")]
        seed: Option<u64>,
        /// Parts of scenarios' names
        #[arg(value_name = "FILTER")]
        filters: Vec<String>,
    },
    /// Make everything that tests need before they start: packages, image, snapshot
    Prepare,
    /// Boot an instance that its user-data makes ready, and keep it running
    Demo {
        /// Show this .deb instead of building one
        #[arg(long, value_name = "FILE")]
        deb: Option<PathBuf>,
    },
    /// Open a shell in the demo's instance, or run a command there
    Shell {
        /// The command; without one, an interactive shell
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// End the demo's instance
    Stop,
    /// Hold the demo's cloud and instance; started by `demo`
    #[command(hide = true)]
    Hold {
        /// The demo's directory
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<ExitCode> {
    match what {
        What::Package { profile } => println!("{}", package::build(profile)?.display()),
        What::Test { list: true, .. } => runner::list(),
        What::Test { jobs, deb, release, evidence, times, seed, filters, .. } => {
            // By default the time in milliseconds, without what is the same for days.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            let seed =
                seed.unwrap_or(u64::from(now.subsec_millis()) + now.as_secs() % 1_000_000 * 1000);
            let cuts = Cuts { times, seed };
            if !runner::run(&filters, runner::Options { jobs, deb, release, evidence, cuts })? {
                return Ok(ExitCode::FAILURE);
            }
        }
        What::Prepare => {
            host::prepare()?;
            package::cargo_deb()?;
            for release in [image::DEFAULT_RELEASE, image::OLDEST_RELEASE] {
                snapshot::Snapshot::booted(&image::Image::of(release)?)?;
            }
        }
        What::Demo { deb } => demo::run(deb)?,
        What::Shell { command } => return demo::shell(&command),
        What::Stop => demo::stop()?,
        What::Hold { dir } => demo::hold(&dir)?,
    }
    Ok(ExitCode::SUCCESS)
}
