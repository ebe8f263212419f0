//! The one way in which hostagent runs another program: by absolute path, with a cleared
//! environment and a fixed locale, without standard input, with a deadline, and with the tail of
//! what it said in every error.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

/// blkid(8)
pub const BLKID: &str = "/sbin/blkid";
/// mkfs.ext4(8)
pub const MKFS_EXT4: &str = "/sbin/mkfs.ext4";
/// mkfs.xfs(8)
pub const MKFS_XFS: &str = "/sbin/mkfs.xfs";
/// resize2fs(8)
pub const RESIZE2FS: &str = "/sbin/resize2fs";
/// xfs_growfs(8)
pub const XFS_GROWFS: &str = "/usr/sbin/xfs_growfs";
/// sshd(8)
pub const SSHD: &str = "/usr/sbin/sshd";
/// sudo(8)
pub const SUDO: &str = "/usr/bin/sudo";

/// What a program that ran to its end said.
#[derive(Debug)]
pub struct Output {
    /// Its exit status; none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// The command line, for messages.
    pub command_line: String,
}

impl Output {
    /// An error that shows the command, its status and the end of its standard error.
    #[must_use]
    pub fn error(&self) -> anyhow::Error {
        let status = self.code.map_or("a signal".to_owned(), |code| format!("status {code}"));
        let lines: Vec<&str> = self.stderr.lines().filter(|l| !l.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(5)..].join("; ");
        anyhow::anyhow!("`{}` ended with {status}: {tail}", self.command_line)
    }

    /// The standard output of a program that must end with status 0.
    pub fn success(self) -> Result<String> {
        if self.code == Some(0) { Ok(self.stdout) } else { Err(self.error()) }
    }
}

/// Runs `program` and waits for its end; kills it when the deadline passes.
pub async fn run(program: &str, args: &[&str], deadline: Duration) -> Result<Output> {
    let command_line =
        std::iter::once(program).chain(args.iter().copied()).collect::<Vec<_>>().join(" ");
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting `{command_line}`"))?;
    let Ok(output) = tokio::time::timeout(deadline, child.wait_with_output()).await else {
        bail!("`{command_line}` did not end within {} s and was killed", deadline.as_secs());
    };
    let output = output.with_context(|| format!("waiting for `{command_line}`"))?;
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command_line,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn an_error_names_the_command_and_what_it_said() {
        let out = block(run("/bin/sh", &["-c", "echo one >&2; exit 3"], Duration::from_secs(5)));
        let text = out.unwrap().success().unwrap_err().to_string();
        assert_eq!(text, "`/bin/sh -c echo one >&2; exit 3` ended with status 3: one");
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let out = block(run("/bin/sleep", &["30"], Duration::from_millis(100)));
        assert!(out.unwrap_err().to_string().contains("did not end within"));
    }

    #[test]
    fn the_environment_is_cleared() {
        let out =
            block(run("/usr/bin/env", &[], Duration::from_secs(5))).unwrap().success().unwrap();
        let mut lines: Vec<&str> = out.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    }
}
