//! Docker's daemon as it is told to be: its configuration file ([`json`]) and its command line
//! ([`flags`]); where it listens; and the change of the file as a transaction ([`transaction`]). What
//! is in force is for [`super::engine_api`] to tell.

pub mod flags;
pub mod json;
pub mod transaction;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sshd::LOOPBACKS;
use super::systemd::Systemd;
use super::{engine_api, files, sockets};
use flags::Flag;

/// Docker's unit.
pub const SERVICE: &str = "docker.service";

/// What starts Docker at the first connection.
pub const SOCKET: &str = "docker.socket";

/// Docker's configuration file, if no flag names another.
const CONFIG: &str = "/etc/docker/daemon.json";

/// The keys that are kept of it. Others may hold secrets.
const KEPT: [&str; 11] = [
    "bridge",
    "hosts",
    "icc",
    "live-restore",
    "log-driver",
    "log-opts",
    "no-new-privileges",
    "seccomp-profile",
    "tls",
    "tlsverify",
    "userland-proxy",
];

/// The same of `log-opts`.
const KEPT_OPTIONS: [&str; 2] = ["max-file", "max-size"];

/// The configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Its path.
    pub path: PathBuf,
    /// The keys that matter, with their values.
    pub settings: BTreeMap<String, Value>,
    /// When it was last changed; none if there is no file.
    pub changed: Option<Timestamp>,
}

/// Reads the configuration file of a daemon with these flags.
pub fn written(flags: &[Flag]) -> Result<Written> {
    let path = config_path(flags);
    let doing = || format!("reading {}", path.display());
    let text = files::read_optional(&path)?;
    let object = json::Object::parse(text.as_deref().unwrap_or_default()).with_context(doing)?;
    let mut settings = BTreeMap::new();
    for key in KEPT {
        let Some(mut value) = object.get(key).with_context(doing)? else { continue };
        if let ("log-opts", Value::Object(options)) = (key, &mut value) {
            options.retain(|name, _| KEPT_OPTIONS.contains(&name.as_str()));
        }
        settings.insert(key.to_owned(), value);
    }
    let changed = match fs::metadata(&path) {
        Ok(meta) => Some(Timestamp::try_from(meta.modified().with_context(doing)?)?),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(e).with_context(doing),
    };
    Ok(Written { path, settings, changed })
}

fn config_path(flags: &[Flag]) -> PathBuf {
    let named = flags.iter().rev().find(|flag| flag.name == "config-file");
    named.map_or(Path::new(CONFIG), |flag| Path::new(&flag.value)).to_path_buf()
}

/// The flags of the daemon that runs.
pub fn flags_of_process(pid: u32) -> Result<Vec<Flag>> {
    Ok(flags::kept(flags::parse(&flags::words_of_process(pid)?)))
}

/// The flags that the daemon's next start will have, as far as its unit tells.
pub async fn flags_of_unit(systemd: &Systemd) -> Result<Vec<Flag>> {
    Ok(flags::kept(flags::parse(&words_of_unit(systemd).await?)))
}

/// What the daemon's next start goes by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtStart {
    /// The flags that its unit gives it.
    pub flags: Vec<Flag>,
    /// Its configuration file.
    pub written: Written,
}

/// Looks at that; none if Docker is not installed.
pub async fn at_start(systemd: &Systemd) -> Result<Option<AtStart>> {
    if !systemd.unit(SERVICE).await?.exists() {
        return Ok(None);
    }
    let flags = flags_of_unit(systemd).await?;
    let written = written(&flags)?;
    Ok(Some(AtStart { flags, written }))
}

/// The command line of the daemon's next start.
async fn words_of_unit(systemd: &Systemd) -> Result<Vec<String>> {
    let command = systemd.start_command(SERVICE).await?;
    let mut variables: BTreeMap<String, String> = BTreeMap::new();
    for assignment in &command.environment {
        if let Some((name, value)) = assignment.split_once('=') {
            variables.insert(name.to_owned(), value.to_owned());
        }
    }
    // Read after `Environment=`, and so outdoing it.
    for (path, _) in &command.environment_files {
        let text = files::read_optional(Path::new(path))?.unwrap_or_default();
        variables.extend(flags::variables(&text));
    }
    Ok(flags::expand(&command.argv, &variables))
}

/// A TCP address on which the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// The address.
    pub address: SocketAddr,
    /// Whether it lets in whoever comes without a certificate, by having been asked.
    pub open: bool,
}

/// Where a process listens on TCP, and whether Docker answers anybody there. Not all of it is Docker's
/// API: since version 28 the daemon itself holds the published ports of containers.
pub async fn doors(pid: u32) -> Result<Vec<Door>> {
    let ask = |address: SocketAddr| async move {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => LOOPBACKS[0],
            IpAddr::V6(ip) if ip.is_unspecified() => LOOPBACKS[1],
            ip => ip,
        };
        let open = engine_api::is_open(SocketAddr::new(ip, address.port())).await;
        Door { address, open }
    };
    Ok(join_all(sockets::of(pid)?.into_iter().map(ask)).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag(path: &Path) -> Vec<Flag> {
        vec![Flag { name: "config-file".into(), value: path.display().to_string() }]
    }

    #[test]
    fn the_file_that_the_flags_name_is_read_without_its_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.json");
        let absent = written(&flag(&path)).unwrap();
        assert_eq!((absent.changed, absent.settings.len()), (None, 0));
        fs::write(
            &path,
            r#"{"icc": false, "log-opts": {"max-size": "1m", "splunk-token": "secret"},
                "proxies": {"http-proxy": "http://u:secret@p"}}"#,
        )
        .unwrap();
        let seen = written(&flag(&path)).unwrap();
        assert!(seen.changed.is_some() && seen.settings["icc"] == Value::Bool(false));
        let shown = serde_json::to_string(&seen).unwrap();
        assert!(shown.contains("1m") && !shown.contains("secret"), "{shown}");
        fs::write(&path, "{").unwrap();
        assert!(written(&flag(&path)).is_err());
        assert!(written(&flag(dir.path())).is_err(), "what cannot be read is not empty");
        assert_eq!(config_path(&[]), Path::new(CONFIG));
    }
}
