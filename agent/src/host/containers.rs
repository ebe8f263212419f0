//! What the containers that run can write to, by the kernel's own account: the mounts that their
//! processes see, with device numbers. No daemon is asked, so that one that hangs or lies changes
//! nothing.
//!
//! The processes are found by [`super::processes`]. A mount is told by `/proc/PID/mountinfo`
//! (proc(5)). Only of an overlay (a container's root, usually) this does not tell the devices, but
//! the paths of the directories that it is made of (`upperdir=`, `workdir=`, `lowerdir=`); they are
//! looked up where they were given: in the root of who holds the container, and in the container's
//! own for an overlay that was mounted inside. That these paths lead where they led at the time of the
//! mount is seen to by `docker-storage`: nothing lies beneath the mounts that are there now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::block::DevNum;
use super::mounts::{self, Mount};
use super::processes::{self, Member, gone};

mod mountinfo;

use mountinfo::Line;

/// Between two looks at something that is about to change.
const AGAIN: Duration = Duration::from_millis(100);

/// How often a path is looked up again that the kernel could not follow: it gives up at a `..` (Docker's
/// short names of layers are such links) when anything on the host was renamed or mounted meanwhile
/// (openat2(2), `EAGAIN`), and wants to be asked again.
const RETRIES: usize = 1000;

/// A container that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// The name that Docker gave it, if it is Docker's.
    pub name: Option<String>,
    /// What is mounted in it, apart from filesystems that keep nothing ([`KEEPS_NOTHING`]).
    pub mounts: Vec<Kept>,
}

/// A mount in a container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Kept {
    /// Where the container sees it.
    pub at: String,
    /// Where it comes from: a path on the host; or what the kernel calls it.
    pub source: String,
    /// The device of the filesystem; major 0 if it has none.
    pub device: DevNum,
    /// The filesystem's type.
    pub fs_type: String,
    /// Whether the container can only read it.
    pub read_only: bool,
    /// The directories that it is made of, if it is an overlay.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub parts: Vec<Part>,
}

/// A directory of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Part {
    /// What it is to the overlay.
    pub role: Role,
    /// Its path, as it was mounted.
    pub path: String,
    /// The device that it is on. None if it was not found; several if the path leads to several, as
    /// seen from the host and from inside.
    pub devices: Vec<DevNum>,
}

/// What a directory is to an overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The writable layer.
    Upper,
    /// Where the kernel prepares what goes there.
    Work,
    /// A layer that is only read.
    Lower,
}

/// Filesystems that live in memory, or are a face of the kernel: nothing that is written there comes
/// to rest on a disk of this host, but by swap.
pub const KEEPS_NOTHING: [&str; 25] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// Looks at all containers that run.
///
/// A process that sees the host's own root is about to become a container's (runc prepares it there),
/// or helps to run something in one: it is looked at again, for at most `patience`. What is still
/// there then has left its container, and its mounts count like all others.
pub fn look(patience: Duration) -> Result<Vec<Container>> {
    let until = Instant::now() + patience;
    let mut still: Option<BTreeSet<i32>> = None;
    loop {
        let host = Host::look()?;
        let members = processes::members()?;
        let views = views(&host, &members)?;
        let outside: BTreeSet<i32> =
            views.iter().filter(|view| view.is_outside).map(|view| view.pid).collect();
        let stay = match &still {
            None => outside,
            Some(before) => before.intersection(&outside).copied().collect(),
        };
        let late = Instant::now() >= until;
        if stay.is_empty() || late {
            let counts = |view: &View| !view.is_outside || stay.contains(&view.pid);
            return containers(&host, views.into_iter().filter(counts));
        }
        still = Some(stay);
        std::thread::sleep(AGAIN);
    }
}

/// The paths that are meant by a list of paths: each, and what it leads to.
pub fn resolved(paths: &[String]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for path in paths {
        all.push(path.clone());
        match fs::canonicalize(path) {
            Ok(target) if target != Path::new(path) => all.push(target.display().to_string()),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("looking at {path}")),
        }
    }
    Ok(all)
}

/// The device that a process sees a directory on; none if it sees none there.
pub fn device_seen_by(pid: u32, path: &Path) -> Result<Option<DevNum>> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    device_in(&root, path)
        .with_context(|| format!("looking at {} as process {pid} sees it", path.display()))
}

/// What the host itself sees.
struct Host {
    namespace: PathBuf,
    mounts: Vec<Mount>,
    root: Option<(DevNum, String)>,
}

impl Host {
    fn look() -> Result<Self> {
        let namespace = fs::read_link("/proc/self/ns/mnt").context("reading /proc/self/ns/mnt")?;
        let mounts = mounts::all()?;
        let root = mounts.iter().rfind(|m| m.mount_point == "/");
        let root = root.map(|mount| (mount.device, mount.root.clone()));
        Ok(Self { namespace, mounts, root })
    }

    /// The path of a directory of a filesystem, if the filesystem is mounted on the host.
    fn path_of(&self, device: DevNum, root: &Path) -> Option<PathBuf> {
        let shows = |mount: &&Mount| mount.device == device && root.starts_with(&mount.root);
        // The mount that shows most of the filesystem: what is mounted once more has its first name.
        let key = |mount: &&Mount| (mount.root.len(), mount.mount_point.len());
        let mount = self.mounts.iter().filter(shows).min_by_key(key)?;
        let rest = root.strip_prefix(&mount.root).ok()?;
        let path = Path::new(&mount.mount_point);
        Some(if rest.as_os_str().is_empty() { path.to_owned() } else { path.join(rest) })
    }
}

/// The mounts that one process of a container sees.
struct View {
    container: String,
    pid: i32,
    shim: Option<i32>,
    lines: Vec<Line>,
    /// Whether it sees the host's own root.
    is_outside: bool,
}

/// One view for each namespace of mounts and root in it that a container's processes have.
fn views(host: &Host, members: &[Member]) -> Result<Vec<View>> {
    let mut seen = BTreeSet::new();
    let mut views = Vec::new();
    for Member { pid, container, shim } in members {
        let doing = || format!("looking at process {pid} of the container {container}");
        let namespace = gone(fs::read_link(format!("/proc/{pid}/ns/mnt")), *pid)?;
        let root = gone(fs::metadata(format!("/proc/{pid}/root/")), *pid)?;
        let (Some(namespace), Some(root)) = (namespace, root) else { continue };
        let key = (container, namespace.clone(), root.dev(), root.ino());
        if seen.contains(&key) {
            continue;
        }
        let text = match fs::read(format!("/proc/{pid}/mountinfo")) {
            // A process that has ended and is not yet collected has no namespace any more.
            Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => continue,
            text => gone(text, *pid)?,
        };
        let Some(text) = text.filter(|text| !text.is_empty()) else { continue };
        let lines = mountinfo::parse(&text).with_context(doing)?;
        let at_root = |line: &&Line| line.mount_point == Path::new("/");
        let is_hosts = |line: &Line| {
            host.root.as_ref().is_some_and(|(device, root)| {
                line.device == *device && line.root == Path::new(root)
            })
        };
        let is_outside = namespace == host.namespace || lines.iter().filter(at_root).any(is_hosts);
        if !is_outside {
            // Of those outside every one counts for itself: it is followed by its number.
            seen.insert(key);
        }
        let (container, pid, shim) = (container.clone(), *pid, *shim);
        views.push(View { container, pid, shim, lines, is_outside });
    }
    Ok(views)
}

fn containers(host: &Host, views: impl Iterator<Item = View>) -> Result<Vec<Container>> {
    let mut found: BTreeMap<String, BTreeSet<Kept>> = BTreeMap::new();
    for view in views {
        let mounts = found.entry(view.container.clone()).or_default();
        for line in &view.lines {
            if KEEPS_NOTHING.contains(&line.fs_type.as_str()) {
                continue;
            }
            let parts = if line.fs_type == "overlay" {
                match overlay_parts(host, line, &view)? {
                    Some(parts) => parts,
                    // The container has ended.
                    None => break,
                }
            } else {
                Vec::new()
            };
            let source = match host.path_of(line.device, &line.root) {
                Some(path) if line.fs_type != "overlay" => path.display().to_string(),
                _ => format!("{} of {}", line.root.display(), line.source),
            };
            mounts.insert(Kept {
                at: line.mount_point.display().to_string(),
                source,
                device: line.device,
                fs_type: line.fs_type.clone(),
                read_only: line.read_only,
                parts,
            });
        }
    }
    let container = |(id, mounts): (String, BTreeSet<Kept>)| Container {
        name: name_of(&id),
        mounts: mounts.into_iter().collect(),
        id,
    };
    Ok(found.into_iter().map(container).collect())
}

/// The directories of an overlay and their devices; none if the process is gone.
fn overlay_parts(host: &Host, line: &Line, view: &View) -> Result<Option<Vec<Part>>> {
    let mut roots = vec![match view.shim {
        Some(shim) => PathBuf::from(format!("/proc/{shim}/root")),
        None => PathBuf::from("/proc/self/root"),
    }];
    // The container's root was mounted from outside; anything else may have been mounted inside.
    if line.mount_point != Path::new("/") {
        roots.push(PathBuf::from(format!("/proc/{}/root", view.pid)));
    }
    let mut parts: Vec<Part> = Vec::new();
    for (role, path) in line.overlay_directories() {
        let mut devices = BTreeSet::new();
        for root in &roots {
            for path in line.candidates(&path, &host.mounts) {
                let seen = device_in(root, &path).with_context(|| {
                    format!("looking at {} of the container {}", path.display(), view.container)
                })?;
                devices.extend(seen);
            }
        }
        let devices: Vec<DevNum> = devices.into_iter().collect();
        // Of the layers that are only read, one for each device: there may be more than a hundred.
        let known = |part: &Part| part.role == Role::Lower && part.devices == devices;
        if role != Role::Lower || !parts.iter().any(known) {
            parts.push(Part { role, path: path.display().to_string(), devices });
        }
    }
    let found_all = parts.iter().all(|part| !part.devices.is_empty());
    let runs = Path::new(&format!("/proc/{}/ns/mnt", view.pid)).symlink_metadata().is_ok();
    // A container that ended meanwhile has its layers removed.
    Ok((found_all || runs).then_some(parts))
}

/// The device of a directory, looked up below another root: links there lead nowhere else.
fn device_in(root: &Path, path: &Path) -> Result<Option<DevNum>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let no_process = |e: &Errno| matches!(*e, Errno::NOENT | Errno::SRCH);
    let root = match rustix::fs::open(root, flags, Mode::empty()) {
        Ok(root) => root,
        Err(e) if no_process(&e) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let open = || openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let mut dir = open();
    for _ in 0..RETRIES {
        if !matches!(dir, Err(Errno::AGAIN)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
        dir = open();
    }
    match dir {
        Ok(dir) => Ok(Some(DevNum::of(fstat(&dir)?.st_dev))),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The name that Docker gave a container, from Docker's own file: for people only.
fn name_of(id: &str) -> Option<String> {
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let file = format!("/var/lib/docker/containers/{id}/config.v2.json");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    Some(config["Name"].as_str()?.trim_start_matches('/').to_owned())
}

#[cfg(test)]
mod tests;
