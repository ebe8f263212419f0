//! `container-storage`: what the containers that run can write to is on the data volume.
//!
//! Two accounts, of which neither replaces the other. The kernel's, of every mount that a container's
//! processes see, by device number ([`crate::host::containers`]): it is taken without the daemons, so
//! that one that hangs or lies changes nothing in it. And the daemon's own: its root directory and what
//! keeps its layers, looked at as the daemon sees them ([`crate::host::engine_api`]).

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::DevNum;
use crate::host::containers::{self, Container, Kept, Part, Role};
use crate::host::device::DataDevice;
use crate::host::engine_api::{self, Account};
use crate::host::systemd::Unit;
use crate::host::{blocking, docker_config};
use crate::volume;

/// See the module.
pub struct ContainerStorage;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The data volume's device.
    pub device: Fact<DataDevice>,
    /// The containers that run, by the kernel's account.
    pub containers: Fact<Vec<Container>>,
    /// `docker.allowed_mounts`, with what these paths lead to.
    pub allowed: Fact<Vec<String>>,
    /// What Docker says of itself, if it runs.
    pub account: Fact<Option<Account>>,
    /// The directories in which the daemons that run keep their data, as they see them.
    pub directories: Fact<Vec<Directory>>,
}

/// A daemon's directory.
#[derive(Debug, Serialize)]
pub struct Directory {
    /// The daemon's unit.
    pub daemon: &'static str,
    /// The path.
    pub path: String,
    /// The device that it is on; none while there is no such directory.
    pub device: Option<DevNum>,
}

/// How long a process that has no root of its own yet is waited for: it takes milliseconds, and on a
/// host that is starved of processors more than ten seconds.
const PATIENCE: Duration = Duration::from_secs(25);

/// How long the look at all containers may take: a mount that does not answer stops it.
const LOOK_DEADLINE: Duration = Duration::from_secs(40);

/// Of several things that are wrong, how many are told.
const TOLD: usize = 4;

impl Control for ContainerStorage {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "container-storage",
        title: "What containers can write to is on the data volume",
        why: "A directory of the host that is mounted into a container takes what the container \
              writes past the encrypted volume, wherever Docker keeps its own data.",
        requires: &["data-mount"],
        // Looked at when Docker is where it is to be, and is not restarted any more; but what a
        // container has mounted is named also where that cannot be reached.
        acts_after: &["docker-storage", "docker-daemon"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let device = volume::find(cx).await;
        let (containers, (account, directories)) = tokio::join!(look(), daemons(cx));
        let paths: Vec<String> =
            cx.config.docker.allowed_mounts.iter().map(|path| path.as_str().to_owned()).collect();
        let allowed = blocking(move || containers::resolved(&paths)).await;
        Facts {
            device: Fact::new("/sys/block", device),
            containers: Fact::new("/proc/PID/mountinfo", containers),
            allowed: Fact::new("docker.allowed_mounts", allowed),
            account: Fact::new("Docker's Engine API, /info", account),
            directories: Fact::new("/proc/PID/root", directories),
        }
    }

    fn judge(&self, _: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let device = facts.device.known()?;
        let (volume, number) = (&device.volumes, device.number());
        let allowed = facts.allowed.known()?;
        let containers = facts.containers.known()?;
        let mut wrong = Vec::new();
        let mut unclear = None;
        for container in containers {
            match of(container, number, allowed) {
                Ok(found) => wrong.extend(found),
                Err(Unknown(why)) => unclear = Some(why),
            }
        }
        if !wrong.is_empty() {
            return Ok(Verdict::fail(
                format!("all that containers have mounted on {volume}, or in memory"),
                some(&wrong),
                format!(
                    "start these containers again with a volume, or a directory of {volume}; what \
                     holds nothing of patients can be added to docker.allowed_mounts"
                ),
            ));
        }
        if let Some(why) = unclear {
            return Err(Unknown(why));
        }
        let seen = match containers.len() {
            0 => "no container runs".to_owned(),
            1 => format!("the 1 container that runs writes to {volume} alone"),
            n => format!("the {n} containers that run write to {volume} alone"),
        };
        // What is known for sure is said, whatever the daemon says or does not say.
        let but =
            |Unknown(why): Unknown| Unknown(format!("{why}; by the kernel's account, {seen}"));
        for directory in facts.directories.known().map_err(but)? {
            let Directory { daemon, path, device } = directory;
            match device {
                Some(device) if *device == number => {}
                Some(device) => {
                    return Ok(Verdict::fail(
                        format!("the daemons' directories on {volume}"),
                        format!("{daemon} keeps its data in {path}, on the device {device}"),
                        "remove from its configuration, or its command line, what moves it there, \
                         or choose a directory on the volume",
                    ));
                }
                None => {
                    let why = format!("{daemon} sees no directory {path}, which it says it uses");
                    return Err(but(Unknown(why)));
                }
            }
        }
        Ok(Verdict::pass(match facts.account.known().map_err(but)? {
            None => format!("{seen}; Docker does not run"),
            Some(Account { root, driver, in_containerd: false, .. }) => {
                format!("{seen}; Docker keeps layers in {root} ({driver})")
            }
            Some(Account { root, driver, in_containerd: true, .. }) => {
                format!("{seen}; Docker keeps volumes in {root}, layers in containerd ({driver})")
            }
        }))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        Ok(match self.judge(config, facts)? {
            Verdict::Fail { .. } => Plan::refuse(
                "hostagent stops no container and changes no daemon's configuration for this",
            ),
            _ => Plan::Nothing,
        })
    }
}

/// What is wrong with a container's mounts.
fn of(container: &Container, data: DevNum, allowed: &[String]) -> Result<Vec<String>, Unknown> {
    let who = match &container.name {
        Some(name) => format!("container {name} ({})", short(&container.id)),
        None => format!("container {}", short(&container.id)),
    };
    let mut wrong: Vec<(&str, String)> = Vec::new();
    let mut unclear = None;
    for mount in &container.mounts {
        // What came along with a mount above, as all that is mounted on the host comes with its root.
        if wrong.iter().any(|(above, _)| Path::new(&mount.at).starts_with(above)) {
            continue;
        }
        match off(mount, data, allowed) {
            Ok(None) => {}
            Ok(Some(what)) => wrong.push((&mount.at, format!("{who} has {what}"))),
            Err(Unknown(why)) => unclear = Some(format!("{who}: {why}")),
        }
    }
    match unclear {
        Some(why) if wrong.is_empty() => Err(Unknown(why)),
        _ => Ok(wrong.into_iter().map(|(_, what)| what).collect()),
    }
}

/// What is wrong with one mount, if anything is.
fn off(mount: &Kept, data: DevNum, allowed: &[String]) -> Result<Option<String>, Unknown> {
    let Kept { at, source, device, fs_type, parts, read_only } = mount;
    if fs_type == "overlay" {
        return layers(at, parts, data);
    }
    if *device == data || is_allowed(source, allowed) {
        return Ok(None);
    }
    let how = if *read_only { ", read-only" } else { "" };
    let whence = if device.major == 0 {
        format!("which is {fs_type}")
    } else {
        format!("which is on the device {device}")
    };
    Ok(Some(format!("{source} mounted on {at}{how}, {whence}")))
}

/// What is wrong with an overlay, if anything is.
fn layers(at: &str, parts: &[Part], data: DevNum) -> Result<Option<String>, Unknown> {
    for Part { role, path, devices } in parts {
        let what = match role {
            Role::Upper => "its writable layer",
            Role::Work => "the work directory of its writable layer",
            Role::Lower => "a layer of its image",
        };
        if let Some(device) = devices.iter().find(|device| **device != data) {
            return Ok(Some(format!("{what} for {at} in {path}, which is on the device {device}")));
        }
        if devices.is_empty() {
            return Err(Unknown(format!("{what} for {at}, {path}, is nowhere to be found")));
        }
    }
    if parts.is_empty() {
        return Err(Unknown(format!("the kernel does not tell the layers of {at}")));
    }
    Ok(None)
}

/// Whether a path is one of these or below one. The root directory stands for itself alone.
fn is_allowed(source: &str, allowed: &[String]) -> bool {
    let source = Path::new(source);
    allowed
        .iter()
        .map(Path::new)
        .any(|path| if path == Path::new("/") { source == path } else { source.starts_with(path) })
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// The first few of a list, and how many more there are.
fn some(all: &[String]) -> String {
    let told = all.iter().take(TOLD).cloned().collect::<Vec<_>>().join("; ");
    match all.len().saturating_sub(TOLD) {
        0 => told,
        more => format!("{told}; and {more} more"),
    }
}

async fn look() -> anyhow::Result<Vec<Container>> {
    let work = blocking(|| containers::look(PATIENCE));
    tokio::time::timeout(LOOK_DEADLINE, work).await.unwrap_or_else(|_| {
        Err(anyhow::anyhow!("what containers see took longer than {LOOK_DEADLINE:?} to look at"))
    })
}

/// What Docker says of itself, and where the directories of the daemons that run are.
async fn daemons(
    cx: &Context,
) -> (anyhow::Result<Option<Account>>, anyhow::Result<Vec<Directory>>) {
    let (docker, containerd) = match (running(cx, DOCKER).await, running(cx, CONTAINERD).await) {
        (Ok(docker), Ok(containerd)) => (docker, containerd),
        (Err(e), _) | (_, Err(e)) => {
            return (Err(anyhow::anyhow!("{e:#}")), Err(e));
        }
    };
    // Only one that runs is asked: the question would start it.
    let account = match docker {
        Some(_) => engine_api::account().await.map(Some),
        None => Ok(None),
    };
    let root = account.as_ref().ok().and_then(Option::as_ref).map(|a| a.root.clone());
    let directories = blocking(move || {
        let mut found = Vec::new();
        if let (Some(pid), Some(path)) = (docker, root) {
            found.push(directory(DOCKER, pid, path)?);
        }
        if let Some(pid) = containerd {
            found.push(directory(CONTAINERD, pid, docker_config::containerd_root()?)?);
        }
        Ok(found)
    });
    (account, directories.await)
}

const DOCKER: &str = "docker.service";
const CONTAINERD: &str = "containerd.service";

fn directory(daemon: &'static str, pid: u32, path: String) -> anyhow::Result<Directory> {
    let device = containers::device_seen_by(pid, Path::new(&path))?;
    Ok(Directory { daemon, path, device })
}

async fn running(cx: &Context, name: &str) -> anyhow::Result<Option<u32>> {
    main_process(name, &cx.host.systemd().await?.unit(name).await?)
}

/// The main process of a service, if it runs. One that is reloaded or about to end still writes, and may
/// not answer.
fn main_process(name: &str, unit: &Unit) -> anyhow::Result<Option<u32>> {
    match (unit.active_state.as_str(), unit.main_pid) {
        ("active", pid) if pid != 0 => Ok(Some(pid)),
        // Between two attempts to start it, nothing of it runs.
        ("activating" | "deactivating", 0) => Ok(None),
        (state, _) if unit.is_up() => Err(anyhow::anyhow!("{name} is {state}")),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
