//! Running programs of this machine: output captured, and an error that names the whole command
//! line with the end of what the program said.

use anyhow::{Context as _, Result, bail};
use std::process::{Command, Output, Stdio};

/// Runs a command to its end and returns its standard output; anything but exit status 0 is an error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.trim().is_empty() {
            said = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        bail!("{}: {}\n{}", line(command), output.status, tail(&said, 25));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, whatever its exit status.
pub fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .env("LC_ALL", "C.UTF-8")
        .output()
        .with_context(|| format!("starting {}", line(command)))
}

/// Runs a command whose output the user should see; standard output goes to standard error, for
/// the lab's own standard output carries results only.
pub fn run_shown(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("starting {}", line(command)))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// A command for cargo itself, without what `cargo run` has put into the lab's environment: build
/// scripts look at some of it, and would run again for nothing.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let of_this_crate =
            ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
        if of_this_crate.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name.as_ref());
        }
    }
    command.env_remove("LD_LIBRARY_PATH").current_dir(crate::cache::workspace());
    command
}

/// The command line for messages.
pub fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
