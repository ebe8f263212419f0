//! The command line: commands and flags, and nothing else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Makes a Docker host on EC2 fit to hold patient data, and refuses to call it ready until that is
/// proven.
///
/// Exit status: 0 all controls are met; 1 something fails; 2 nothing fails, but something could not
/// be judged; 64 wrong usage; 70 internal error; 75 another run is under way; 77 not root; 78 the
/// configuration has an error.
#[derive(Debug, Parser)]
#[command(name = "hostagent", version, max_term_width = 100)]
pub struct Cli {
    /// The configuration file; its conf.d/*.toml are read too
    /// [default: /etc/hostagent/hostagent.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring this host to the required state, verify it, and signal the result (root)
    Provision(Selection),
    /// Show what `provision` would do; changes nothing (root)
    Plan(Selection),
    /// Check every control; changes nothing (root)
    Verify(Selection),
    /// Show one control: why it exists, each fact with its source and time, the verdict, and what to
    /// do; changes nothing (root)
    Explain {
        /// The control, see `hostagent controls`
        #[arg(value_name = "ID")]
        id: String,

        /// The form of the result.
        #[command(flatten)]
        output: Output,
    },
    /// Check quickly, by this machine alone, that Docker's storage is where it must be (root;
    /// systemd runs it before Docker)
    Gate,
    /// Show the last result: ready or not, since when, and what is wrong
    Status(Output),
    /// List the controls
    Controls(Output),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `hostagent config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration files
    Check,
}

/// Which controls, and in which form.
#[derive(Debug, Args)]
pub struct Selection {
    /// Only these controls, and what they depend on
    #[arg(long, value_name = "ID", num_args = 1.., value_delimiter = ',')]
    pub only: Vec<String>,

    /// Not these controls
    #[arg(long, value_name = "ID", num_args = 1.., value_delimiter = ',')]
    pub skip: Vec<String>,

    /// The form of the result.
    #[command(flatten)]
    pub output: Output,
}

/// The form of the result.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// The form of the result
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// A form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// For programs; versioned
    Json,
}
