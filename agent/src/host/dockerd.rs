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
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use futures_util::future::join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::command_line::{words_of_process, words_of_unit};
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
const KEPT: [&str; 13] = [
    "bridge",
    "data-root",
    "graph",
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

/// Where Docker keeps its data, if it is not told otherwise.
const ROOT: &str = "/var/lib/docker";

/// The same of `log-opts`.
const KEPT_OPTIONS: [&str; 2] = ["max-file", "max-size"];

/// The configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Its path.
    pub path: PathBuf,
    /// The keys that matter, with their values.
    pub settings: BTreeMap<String, Value>,
    /// When it was last changed or put there; none if there is no file. A change of its mode counts,
    /// for a file that was moved there keeps the time of its content.
    pub changed: Option<Timestamp>,
}

/// Reads the configuration file of a daemon with these flags.
pub fn written(flags: &[Flag]) -> Result<Written> {
    let path = config_path(flags);
    let doing = || format!("reading {}", path.display());
    let text = files::read_optional(&path)?;
    if text.is_none() && path.is_symlink() {
        bail!("{} is a link that leads nowhere", path.display());
    }
    let object = json::Object::parse(text.as_deref().unwrap_or_default()).with_context(doing)?;
    let mut settings = BTreeMap::new();
    for key in KEPT {
        let Some(mut value) = object.get(key).with_context(doing)? else { continue };
        if let ("log-opts", Value::Object(options)) = (key, &mut value) {
            options.retain(|name, _| KEPT_OPTIONS.contains(&name.as_str()));
        }
        settings.insert(key.to_owned(), value);
    }
    let changed = changed(&path).with_context(doing)?;
    Ok(Written { path, settings, changed })
}

/// The later of a file's change and that of a link to it.
fn changed(path: &Path) -> Result<Option<Timestamp>> {
    let mut latest = None;
    for meta in [fs::symlink_metadata(path), fs::metadata(path)] {
        let meta = match meta {
            Ok(meta) => meta,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let nanoseconds = meta.ctime_nsec().try_into()?;
        latest = latest.max(Some(Timestamp::new(meta.ctime(), nanoseconds)?));
    }
    Ok(latest)
}

fn config_path(flags: &[Flag]) -> PathBuf {
    let named = flags.iter().rev().find(|flag| flag.name == "config-file");
    named.map_or(Path::new(CONFIG), |flag| Path::new(&flag.value)).to_path_buf()
}

/// The flags of the daemon that runs.
pub fn flags_of_process(pid: u32) -> Result<Vec<Flag>> {
    Ok(flags::kept(flags::parse(&words_of_process(pid)?)))
}

/// The flags that the daemon's next start will have, as far as its unit tells.
pub async fn flags_of_unit(systemd: &Systemd) -> Result<Vec<Flag>> {
    Ok(flags::kept(flags::parse(&words_of_unit(systemd, SERVICE).await?)))
}

/// The same of a unit that starts dockerd itself; none of one that has something else start it, which
/// may add to them.
pub async fn flags_at_next_start(systemd: &Systemd) -> Result<Option<Vec<Flag>>> {
    let words = words_of_unit(systemd, SERVICE).await?;
    Ok(is_dockerd(&words).then(|| flags::kept(flags::parse(&words))))
}

/// Whether a command line is dockerd's own.
fn is_dockerd(words: &[String]) -> bool {
    let program = words.first().and_then(|program| Path::new(program).file_name());
    program.is_some_and(|name| name == "dockerd")
}

/// Whether Docker is part of a swarm, by what it keeps on the disk: with live-restore it would not
/// start then (moby, `IsSwarmCompatible`).
pub fn in_swarm(flags: &[Flag], written: &Written) -> Result<bool> {
    let of_flag = |flag: &&Flag| matches!(flag.name.as_str(), "data-root" | "graph");
    let by_flag = flags.iter().rev().find(of_flag).map(|flag| flag.value.as_str());
    let by_file =
        || ["data-root", "graph"].iter().find_map(|key| written.settings.get(*key)?.as_str());
    let state = Path::new(by_flag.or_else(by_file).unwrap_or(ROOT)).join("swarm/docker-state.json");
    state.try_exists().with_context(|| format!("looking for {}", state.display()))
}

/// What the daemon's next start goes by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtStart {
    /// The flags that its unit gives it.
    pub flags: Vec<Flag>,
    /// Its configuration file.
    pub written: Written,
    /// Whether it is part of a swarm.
    pub swarm: bool,
}

/// Looks at that; none if Docker is not installed.
pub async fn at_start(systemd: &Systemd) -> Result<Option<AtStart>> {
    if !systemd.unit(SERVICE).await?.exists() {
        return Ok(None);
    }
    let flags = flags_of_unit(systemd).await?;
    let written = written(&flags)?;
    let swarm = in_swarm(&flags, &written)?;
    Ok(Some(AtStart { flags, written, swarm }))
}

/// A TCP address on which the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// The address.
    pub address: SocketAddr,
    /// Whether it lets in whoever comes without a certificate, by having been asked.
    pub open: bool,
    /// Why that is not known; none if it is.
    pub unclear: Option<String>,
}

impl Door {
    /// What comes of the answers at an address, by all ways on which it was asked. One that has none
    /// leaves it open, or not, to the others: without IPv6, `[::]` is still reached over IPv4.
    fn of(address: SocketAddr, answers: Vec<Result<bool>>) -> Self {
        let open = answers.iter().any(|answer| matches!(answer, Ok(true)));
        let known = answers.iter().any(Result::is_ok);
        let first = answers.into_iter().find_map(Result::err).filter(|_| !known);
        Self { address, open, unclear: first.map(|e| format!("{e:#}")) }
    }
}

/// Where a process listens on TCP, and whether Docker answers anybody there. Not all of it is Docker's
/// API: since version 28 the daemon itself holds the published ports of containers.
pub async fn doors(pid: u32) -> Result<Vec<Door>> {
    let ask = |address: SocketAddr| async move {
        let ask = |ip| engine_api::is_open(SocketAddr::new(ip, address.port()));
        Door::of(address, join_all(ways_to(address.ip()).into_iter().map(ask)).await)
    };
    Ok(join_all(sockets::of(pid)?.into_iter().map(ask)).await)
}

/// Where an address is reached from this machine.
fn ways_to(ip: IpAddr) -> Vec<IpAddr> {
    let [v4, v6] = LOOPBACKS;
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![v4],
        // A socket of both families, unless it is told otherwise.
        IpAddr::V6(ip) if ip.is_unspecified() => vec![v6, v4],
        ip => vec![ip],
    }
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

    #[test]
    fn a_file_that_was_moved_there_has_changed_and_so_has_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("daemon.json"), dir.path().join("other.json"));
        fs::write(&other, "{}").unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        fs::File::open(&other).unwrap().set_modified(long_ago).unwrap();
        let before = changed(&other).unwrap().unwrap();
        assert!(before > Timestamp::UNIX_EPOCH);
        // Longer than the kernel's clock for files stands still.
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let linked = changed(&path).unwrap().unwrap();
        assert!(linked > before && changed(&other).unwrap() == Some(before));
        fs::remove_file(&other).unwrap();
        let error = written(&flag(&path)).unwrap_err().to_string();
        assert!(error.ends_with("is a link that leads nowhere"), "{error}");
        assert_eq!(changed(&other).unwrap(), None);
    }

    #[test]
    fn a_door_is_closed_only_where_something_answered() {
        let address: SocketAddr = "[::]:2375".parse().unwrap();
        assert_eq!(ways_to(address.ip()), [LOOPBACKS[1], LOOPBACKS[0]]);
        assert_eq!(ways_to("0.0.0.0".parse().unwrap()), [LOOPBACKS[0]]);
        let of = |answers: &[Option<bool>]| {
            let answer = |answer: &Option<bool>| answer.context("no route");
            let door = Door::of(address, answers.iter().map(answer).collect());
            (door.open, door.unclear.is_some())
        };
        let (open, closed, unclear) = ((true, false), (false, false), (false, true));
        // As with disable_ipv6: the first cannot be connected to.
        assert_eq!(of(&[None, Some(true)]), open);
        assert_eq!(of(&[None, Some(false)]), closed);
        assert_eq!(of(&[Some(false), Some(true)]), open);
        assert_eq!(of(&[Some(false), None]), closed);
        assert_eq!(of(&[None, None]), unclear);
        assert_eq!(of(&[]), closed);
    }

    #[test]
    fn a_swarm_is_found_in_dockers_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display().to_string();
        let written = |key: &str| Written {
            path: CONFIG.into(),
            settings: [(key.to_owned(), Value::from(root.clone()))].into(),
            changed: None,
        };
        let by_flag = [Flag { name: "data-root".into(), value: root.clone() }];
        let seen = || {
            let of = |flags: &[Flag], key| in_swarm(flags, &written(key)).unwrap();
            [of(&by_flag, "none"), of(&[], "data-root"), of(&[], "graph")]
        };
        assert_eq!(seen(), [false; 3]);
        fs::create_dir(dir.path().join("swarm")).unwrap();
        assert_eq!(seen(), [false; 3], "one that was left");
        fs::write(dir.path().join("swarm/docker-state.json"), "{}").unwrap();
        assert_eq!(seen(), [true; 3]);
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(is_dockerd(&words("/usr/sbin/dockerd -H fd://")));
        assert!(!is_dockerd(&words("/bin/sh dockerd")) && !is_dockerd(&[]));
    }
}
