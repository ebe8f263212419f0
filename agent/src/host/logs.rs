//! Where what containers say can come to rest: journald, a syslog daemon beside it, and Docker's log
//! driver.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::files;

/// Where journald keeps what outlives a boot.
pub const PERSISTENT_JOURNAL: &str = "/var/log/journal";

/// Where a syslog daemon writes, and where [`PERSISTENT_JOURNAL`] is.
pub const LOGS: &str = "/var/log";

/// The file of rsyslog's that loads its own reader of the journal, which takes what journald does
/// not forward; none if there is none. Debian and Ubuntu do without it.
pub fn journal_reader() -> Result<Option<PathBuf>> {
    let main = Path::new("/etc/rsyslog.conf");
    let dir = Path::new("/etc/rsyslog.d");
    let mut paths = vec![main.to_path_buf()];
    match fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                paths.push(entry.context("listing /etc/rsyslog.d")?.path());
            }
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).context("listing /etc/rsyslog.d"),
    }
    paths.sort();
    for path in paths {
        if path != main && path.extension().is_none_or(|ext| ext != "conf") {
            continue;
        }
        if files::read_optional(&path)?.is_some_and(|text| reads_the_journal(&text)) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn reads_the_journal(rsyslog: &str) -> bool {
    rsyslog.lines().any(|line| !line.trim_start().starts_with('#') && line.contains("imjournal"))
}

/// Docker's default log driver, as far as it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogDriver {
    /// Its name.
    pub name: String,
    /// The option `syslog-address`.
    pub syslog_address: Option<String>,
    /// Where that is said.
    pub by: String,
}

/// What Docker does without being told.
const DEFAULT_DRIVER: &str = "json-file";

/// Docker's default log driver: from `daemon.json`, or from the command line of the daemon with this
/// process id, if it runs. Docker does not start when both name one.
pub fn docker_driver(pid: Option<u32>) -> Result<LogDriver> {
    let path = "/etc/docker/daemon.json";
    let mut driver = from_json(&files::read_optional(Path::new(path))?.unwrap_or_default())
        .with_context(|| format!("reading {path}"))?;
    if let Some(pid) = pid {
        let line = format!("/proc/{pid}/cmdline");
        let bytes = fs::read(&line).with_context(|| format!("reading {line}"))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        add_flags(&mut driver, &text.split('\0').collect::<Vec<_>>());
    }
    Ok(driver)
}

fn from_json(text: &str) -> Result<LogDriver> {
    let json: serde_json::Value =
        if text.trim().is_empty() { serde_json::Value::Null } else { serde_json::from_str(text)? };
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let name = json.get("log-driver").and_then(text);
    let by = if name.is_some() { "/etc/docker/daemon.json" } else { "Docker's default" };
    Ok(LogDriver {
        name: name.unwrap_or_else(|| DEFAULT_DRIVER.to_owned()),
        syslog_address: json
            .get("log-opts")
            .and_then(|options| options.get("syslog-address"))
            .and_then(text),
        by: by.to_owned(),
    })
}

fn add_flags(driver: &mut LogDriver, words: &[&str]) {
    let value = |i: usize, flag: &str| -> Option<String> {
        match words[i].strip_prefix(flag)? {
            "" => words.get(i + 1).map(|&word| word.to_owned()),
            rest => rest.strip_prefix('=').map(str::to_owned),
        }
    };
    for i in 0..words.len() {
        if let Some(name) = value(i, "--log-driver") {
            let by = "dockerd's command line".to_owned();
            *driver = LogDriver { name, by, syslog_address: driver.syslog_address.take() };
        }
        let option = value(i, "--log-opt");
        if let Some(address) = option.as_deref().and_then(|o| o.strip_prefix("syslog-address=")) {
            driver.syslog_address = Some(address.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_read_from_file_and_command_line() {
        let none = from_json("").unwrap();
        assert_eq!((none.name.as_str(), none.syslog_address), ("json-file", None));
        let text =
            r#"{"log-driver": "syslog", "log-opts": {"syslog-address": "udp://127.0.0.1:514"}}"#;
        let file = from_json(text).unwrap();
        assert_eq!(file.name, "syslog");
        assert_eq!(file.syslog_address.as_deref(), Some("udp://127.0.0.1:514"));
        assert!(from_json("{").is_err());

        for words in [
            &["dockerd", "--log-driver", "journald", "--log-opt", "tag=x"][..],
            &["dockerd", "--log-driver=journald", ""],
        ] {
            let mut driver = from_json("{}").unwrap();
            add_flags(&mut driver, words);
            assert_eq!((driver.name.as_str(), driver.syslog_address), ("journald", None));
            assert_eq!(driver.by, "dockerd's command line");
        }
        let mut driver = from_json("{}").unwrap();
        add_flags(&mut driver, &["dockerd", "--log-driver"]);
        add_flags(&mut driver, &["--log-opt=syslog-address=tcp://logs.example.com:601"]);
        assert_eq!(driver.name, "json-file");
        assert!(driver.syslog_address.is_some());
    }

    #[test]
    fn a_reader_of_the_journal_is_seen_in_both_syntaxes() {
        assert!(reads_the_journal("module(load=\"imjournal\" StateFile=\"x\")\n"));
        assert!(reads_the_journal("$ModLoad imjournal\n"));
        assert!(!reads_the_journal("# module(load=\"imjournal\")\nmodule(load=\"imuxsock\")\n"));
    }
}
