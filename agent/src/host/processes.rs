//! Processes, from `/proc`: which belong to containers, and which use something below a directory.
//! No daemon is asked: one that hangs, or does not run, has containers all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, sleep};

use super::mounts::{self, Mount};

/// How long a container has to end after SIGTERM, as with `docker stop`.
const GRACE: Duration = Duration::from_secs(10);

/// How long processes may take to be gone after SIGKILL.
const KILLED: Duration = Duration::from_secs(20);

/// The name of a container's parent process; the kernel cuts names off after 15 characters.
const SHIM: &str = "containerd-shim";

/// A process that belongs to a container.
#[derive(Debug)]
struct Contained {
    pid: i32,
    parent: i32,
    is_shim: bool,
    container: String,
}

/// A process in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub pid: i32,
    /// The container's id.
    pub container: String,
    /// The process that holds the container, if it is known: it sees the container's files from
    /// outside.
    pub shim: Option<i32>,
}

/// The processes in containers, without those that hold the containers.
pub fn members() -> Result<Vec<Member>> {
    Ok(members_among(&contained()?))
}

fn members_among(all: &[Contained]) -> Vec<Member> {
    let by_pid: BTreeMap<i32, &Contained> = all.iter().map(|p| (p.pid, p)).collect();
    // As many steps as there are processes: the parents may have changed while they were read.
    let shim_of = |process: &Contained| {
        let mut at = process.parent;
        for _ in all {
            let above = by_pid.get(&at)?;
            if above.is_shim {
                return Some(above.pid);
            }
            at = above.parent;
        }
        None
    };
    let inside = all.iter().filter(|process| !process.is_shim);
    inside
        .map(|p| Member { pid: p.pid, container: p.container.clone(), shim: shim_of(p) })
        .collect()
}

/// The ids of the containers that run, paused and just created ones too.
pub fn containers() -> Result<Vec<String>> {
    let ids: BTreeSet<String> = contained()?.into_iter().map(|p| p.container).collect();
    Ok(ids.into_iter().collect())
}

/// What an operator does about containers that go on without Docker.
pub const TO_STOP: &str = "set docker.migrate to \"running\" and run `hostagent provision`, which stops \
                           them, or stop the instance";

/// Containers as people know them.
#[must_use]
pub fn short(containers: &[String]) -> String {
    let ids: Vec<&str> = containers.iter().map(|id| id.get(..12).unwrap_or(id)).collect();
    ids.join(", ")
}

/// Stops the containers that outlived their daemons: SIGTERM to the first process of each, SIGKILL to
/// what is left, and then the processes that held them.
pub async fn stop_containers() -> Result<()> {
    let all = contained()?;
    let shims: BTreeSet<i32> = all.iter().filter(|p| p.is_shim).map(|p| p.pid).collect();
    for process in all.iter().filter(|p| shims.contains(&p.parent)) {
        signal(process, Signal::TERM);
    }
    let ended = |all: &[Contained]| all.iter().all(|p| p.is_shim);
    if !wait(GRACE, ended).await? {
        for process in contained()?.iter().filter(|p| !p.is_shim) {
            signal(process, Signal::KILL);
        }
        wait(KILLED, ended).await?;
    }
    for process in &contained()? {
        signal(process, Signal::KILL);
    }
    ensure!(
        wait(KILLED, <[Contained]>::is_empty).await?,
        "containers still run after SIGKILL: {}",
        containers()?.join(", ")
    );
    Ok(())
}

async fn wait(limit: Duration, done: impl Fn(&[Contained]) -> bool) -> Result<bool> {
    let until = Instant::now() + limit;
    loop {
        if done(&contained()?) {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Signals a process, if it is still the one that was seen. One that is gone needs none.
fn signal(process: &Contained, signal: Signal) {
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    // The descriptor holds this very process; was the number given away before, it is not signalled.
    let still = look(process.pid).ok().flatten();
    if still.is_some_and(|now| now.container == process.container) {
        let _ = pidfd_send_signal(fd, signal);
    }
}

fn contained() -> Result<Vec<Contained>> {
    let mut found = Vec::new();
    for pid in pids()? {
        found.extend(look(pid)?);
    }
    let mut others = Vec::new();
    for pid in pids()? {
        if !found.iter().any(|process| process.pid == pid)
            && let Some(parent) = parent_of(pid)?
        {
            others.push((pid, parent));
        }
    }
    add_descendants(&mut found, others);
    Ok(found)
}

/// Adds those of the other processes (with their parents) that descend from a container's. What a shim
/// started is a container's, with all that this started, whatever its control group is called: a shim
/// adopts the orphans below it (containerd's runtime v2 sets `PR_SET_CHILD_SUBREAPER`).
fn add_descendants(found: &mut Vec<Contained>, mut others: Vec<(i32, i32)>) {
    let mut held: BTreeMap<i32, String> =
        found.iter().map(|p| (p.pid, p.container.clone())).collect();
    loop {
        let before = others.len();
        others.retain(|&(pid, parent)| {
            let Some(container) = held.get(&parent).cloned() else { return true };
            held.insert(pid, container.clone());
            found.push(Contained { pid, parent, is_shim: false, container });
            false
        });
        if others.len() == before {
            return;
        }
    }
}

fn look(pid: i32) -> Result<Option<Contained>> {
    let Some(name) = gone(fs::read_to_string(format!("/proc/{pid}/comm")), pid)? else {
        return Ok(None);
    };
    let Some(parent) = parent_of(pid)? else { return Ok(None) };
    if name.trim_end() == SHIM {
        let Some(line) = gone(fs::read(format!("/proc/{pid}/cmdline")), pid)? else {
            return Ok(None);
        };
        // A shim that has ended and is not yet collected has no command line, and no container.
        if line.is_empty() {
            return Ok(None);
        }
        let container = shim_id(&line).unwrap_or_else(|| format!("of process {pid}"));
        return Ok(Some(Contained { pid, parent, is_shim: true, container }));
    }
    let Some(groups) = gone(fs::read_to_string(format!("/proc/{pid}/cgroup")), pid)? else {
        return Ok(None);
    };
    Ok(container_of(&groups).map(|container| Contained { pid, parent, is_shim: false, container }))
}

fn parent_of(pid: i32) -> Result<Option<i32>> {
    let Some(stat) = gone(fs::read_to_string(format!("/proc/{pid}/stat")), pid)? else {
        return Ok(None);
    };
    // proc(5): the name in parentheses may hold anything; after it come the state and the parent.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut words = rest.split_whitespace();
    let (state, parent) = (words.next(), words.next());
    Ok(if state == Some("Z") { None } else { parent.and_then(|p| p.parse().ok()) })
}

/// The container in a shim's command line: `-namespace moby -id ID …`.
fn shim_id(line: &[u8]) -> Option<String> {
    let mut words = line.split(|byte| *byte == 0);
    words.find(|word| matches!(*word, b"-id" | b"--id"))?;
    words.next().map(|id| String::from_utf8_lossy(id).into_owned())
}

/// The container in the names of control groups: `docker-ID.scope` under systemd, `docker/ID` without.
fn container_of(groups: &str) -> Option<String> {
    let is_id = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    for line in groups.lines() {
        let path = line.splitn(3, ':').nth(2).unwrap_or_default();
        let mut above = "";
        for part in path.split('/') {
            let scope = part.strip_suffix(".scope").and_then(|name| name.rsplit_once('-'));
            let id = match scope {
                Some(("docker" | "cri-containerd" | "nerdctl", id)) => Some(id),
                _ if above == "docker" => Some(part),
                _ => None,
            };
            if let Some(id) = id.filter(|id| is_id(id)) {
                return Some(id.to_owned());
            }
            above = part;
        }
    }
    None
}

fn pids() -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("listing the processes")? {
        let name = entry.context("listing the processes")?.file_name();
        found.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(found)
}

/// What was read of a process; none if the process is gone.
pub(super) fn gone<T>(result: std::io::Result<T>, pid: i32) -> Result<Option<T>> {
    let no_process = nix::libc::ESRCH;
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(no_process) => {
            Ok(None)
        }
        Err(e) => Err(e).with_context(|| format!("looking at process {pid}")),
    }
}

/// Who uses something at or below a directory, other than this process: by an open file, a working
/// directory, a root, a program, mapped memory, or a mount in any namespace; and what the kernel itself
/// uses there, for swap or as a loop device.
pub fn users_of(dir: &Path) -> Result<Vec<String>> {
    let mut found = users_among(&pids()?, dir)?;
    let inside = |path: &str| Path::new(path.trim_end()).starts_with(dir);
    let swaps = fs::read_to_string("/proc/swaps").context("reading /proc/swaps")?;
    let files = swaps.lines().filter_map(|line| line.split_whitespace().next());
    found.extend(files.filter(|file| inside(file)).map(|file| format!("{file} is used for swap")));
    for disk in fs::read_dir("/sys/block").context("listing /sys/block")? {
        let disk = disk.context("listing /sys/block")?;
        let Some(file) = backing_file(&disk.path())? else { continue };
        if inside(&file) {
            let name = disk.file_name();
            found.push(format!("{} is the disk {}", file.trim_end(), name.to_string_lossy()));
        }
    }
    Ok(found)
}

/// The file behind a disk of `/sys/block`, which only a loop device that is in use has.
fn backing_file(disk: &Path) -> Result<Option<String>> {
    use nix::libc::{ENODEV, ENOENT, ENXIO};
    let path = disk.join("loop/backing_file");
    match fs::read_to_string(&path) {
        Ok(file) => Ok(Some(file)),
        // The last two: it was set free meanwhile.
        Err(e) if e.raw_os_error().is_some_and(|no| [ENOENT, ENXIO, ENODEV].contains(&no)) => {
            Ok(None)
        }
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

fn users_among(pids: &[i32], dir: &Path) -> Result<Vec<String>> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let place = InFilesystem::of(dir, &mounts::all()?);
    let mut namespaces = BTreeSet::new();
    let mut found = Vec::new();
    for &pid in pids {
        if pid == own {
            continue;
        }
        if let Some(what) = use_by(pid, dir, place.as_ref(), &mut namespaces)? {
            let name = gone(fs::read_to_string(format!("/proc/{pid}/comm")), pid)?;
            let name = name.as_deref().map_or("gone meanwhile", str::trim_end);
            found.push(format!("process {pid} ({name}) has {what}"));
        }
    }
    Ok(found)
}

fn use_by(
    pid: i32,
    dir: &Path,
    place: Option<&InFilesystem>,
    namespaces: &mut BTreeSet<PathBuf>,
) -> Result<Option<String>> {
    for (link, word) in
        [("cwd", "its working directory"), ("root", "its root"), ("exe", "its program")]
    {
        let target = gone(fs::read_link(format!("/proc/{pid}/{link}")), pid)?;
        if let Some(target) = target.filter(|target| target.starts_with(dir)) {
            return Ok(Some(format!("{word} at {}", target.display())));
        }
    }
    let Some(open) = gone(fs::read_dir(format!("/proc/{pid}/fd")), pid)? else { return Ok(None) };
    for entry in open {
        let Some(entry) = gone(entry, pid)? else { continue };
        let target = gone(fs::read_link(entry.path()), pid)?;
        if let Some(target) = target.filter(|target| target.starts_with(dir)) {
            return Ok(Some(format!("{} open", target.display())));
        }
    }
    let Some(maps) = gone(fs::read(format!("/proc/{pid}/maps")), pid)? else { return Ok(None) };
    for line in String::from_utf8_lossy(&maps).lines() {
        let path = line.find('/').map_or("", |at| &line[at..]);
        if Path::new(path).starts_with(dir) {
            return Ok(Some(format!("{path} mapped")));
        }
    }
    let Some(namespace) = gone(fs::read_link(format!("/proc/{pid}/ns/mnt")), pid)? else {
        return Ok(None);
    };
    if !namespaces.insert(namespace) {
        return Ok(None);
    }
    let Some(text) = gone(fs::read(format!("/proc/{pid}/mountinfo")), pid)? else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&text);
    let held = text.lines().find(|line| holds(line, dir, place));
    let point = |line: &str| line.split(' ').nth(4).unwrap_or_default().to_owned();
    Ok(held.map(|line| format!("a part of it mounted on {}", point(line))))
}

/// Where a directory is within its filesystem.
struct InFilesystem {
    device: String,
    path: PathBuf,
}

impl InFilesystem {
    fn of(dir: &Path, mounts: &[Mount]) -> Option<Self> {
        let above = mounts.iter().filter(|m| dir.starts_with(&m.mount_point));
        // The longest, and of several on one place the last.
        let mount = above.max_by_key(|m| m.mount_point.len())?;
        let rest = dir.strip_prefix(&mount.mount_point).ok()?;
        Some(Self { device: mount.device.to_string(), path: Path::new(&mount.root).join(rest) })
    }
}

/// Whether a line of mountinfo (proc(5)) is a mount on, of, or over something below a directory.
fn holds(line: &str, dir: &Path, place: Option<&InFilesystem>) -> bool {
    let (mount, filesystem) = line.split_once(" - ").unwrap_or((line, ""));
    let words: Vec<&str> = mount.split(' ').collect();
    let [_, _, device, root, point, ..] = words[..] else { return false };
    let inside = format!("{}/", dir.display());
    Path::new(point).starts_with(dir)
        || place.is_some_and(|p| p.device == device && Path::new(root).starts_with(&p.path))
        // The layers of an overlay.
        || filesystem.contains(&inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn containers_are_told_by_their_control_groups() {
        let table = [
            (format!("0::/system.slice/docker-{ID}.scope\n"), true),
            (format!("12:pids:/docker/{ID}\n0::/\n"), true),
            (format!("0::/system.slice/docker-{ID}.scope/init\n"), true),
            (format!("0::/kubepods.slice/cri-containerd-{ID}.scope"), true),
            (format!("0::/machine.slice/libpod-{ID}.scope"), false),
            ("0::/system.slice/docker.service\n".to_owned(), false),
            ("0::/system.slice/docker-short.scope\n".to_owned(), false),
            (String::new(), false),
        ];
        for (groups, is) in table {
            assert_eq!(container_of(&groups).as_deref() == Some(ID), is, "{groups}");
        }
        let line = format!("/usr/bin/containerd-shim-runc-v2\0-namespace\0moby\0-id\0{ID}\0");
        assert_eq!(shim_id(line.as_bytes()).as_deref(), Some(ID));
        assert_eq!(shim_id(b"containerd-shim\0"), None);
    }

    #[test]
    fn whoever_descends_from_a_shim_is_in_its_container() {
        let process = |pid, parent, is_shim, container: &str| Contained {
            pid,
            parent,
            is_shim,
            container: container.into(),
        };
        let all = [
            process(10, 1, true, "a"),
            process(11, 10, false, "a"),
            process(12, 11, false, "a"),
            // A daemon inside of the container has one of its own.
            process(20, 12, true, "b"),
            process(21, 20, false, "b"),
            // By its control group alone; and two that name each other.
            process(30, 1, false, "c"),
            process(40, 41, false, "d"),
            process(41, 40, false, "d"),
        ];
        let seen: Vec<_> = members_among(&all).iter().map(|m| (m.pid, m.shim)).collect();
        let expected =
            [(11, Some(10)), (12, Some(10)), (21, Some(20)), (30, None), (40, None), (41, None)];
        assert_eq!(seen, expected);

        // Whatever the order in which they are listed.
        let mut all = vec![process(10, 1, true, "a")];
        add_descendants(&mut all, vec![(13, 12), (12, 11), (5, 1), (11, 10), (14, 99)]);
        let mut pids: Vec<_> = all.iter().map(|p| (p.pid, p.container.as_str())).collect();
        pids.sort_unstable();
        assert_eq!(pids, [(10, "a"), (11, "a"), (12, "a"), (13, "a")]);
    }

    #[test]
    fn mounts_that_hold_a_directory_are_seen() {
        let dir = Path::new("/var/lib/docker");
        let place = InFilesystem { device: "254:0".into(), path: "/@/var/lib/docker".into() };
        let table = [
            ("1 2 254:0 /@ / rw - ext4 /dev/vda rw", false),
            ("1 2 0:50 / /var/lib/docker/overlay2/ab/merged rw - overlay overlay rw", true),
            ("1 2 0:50 / /var/lib/docker2 rw - overlay overlay rw", false),
            ("1 2 254:0 /@/var/lib/docker/volumes/v/_data /records rw - ext4 /dev/vda rw", true),
            ("1 2 254:1 /@/var/lib/docker/volumes/v/_data /records rw - ext4 /dev/vdb rw", false),
            (
                "1 2 0:51 / / rw - overlay overlay rw,upperdir=/var/lib/docker/overlay2/ab/diff",
                true,
            ),
            ("nonsense", false),
        ];
        for (line, is) in table {
            assert_eq!(holds(line, dir, Some(&place)), is, "{line}");
        }
    }

    #[test]
    fn only_what_has_no_backing_file_is_no_loop_device() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(backing_file(dir.path()).unwrap(), None);
        let file = dir.path().join("loop/backing_file");
        fs::create_dir_all(&file).unwrap();
        // A directory in its place cannot be read, which is no absence.
        assert!(backing_file(dir.path()).unwrap_err().to_string().contains("loop/backing_file"));
        fs::remove_dir(&file).unwrap();
        fs::write(&file, "/srv/disk\n").unwrap();
        assert_eq!(backing_file(dir.path()).unwrap().as_deref(), Some("/srv/disk\n"));
    }

    #[test]
    fn who_uses_a_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        fs::write(path.join("file"), "x").unwrap();
        let mut inside = std::process::Command::new("/bin/sleep");
        let mut inside = inside.arg("60").current_dir(&path).spawn().unwrap();
        let mut holding = std::process::Command::new("/bin/sleep");
        let input = fs::File::open(path.join("file")).unwrap();
        let mut holding = holding.arg("60").stdin(input).spawn().unwrap();
        let mut bystander = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        // Not all of them: some machines let not even root look at every process.
        let children = [&inside, &holding, &bystander].map(|c| i32::try_from(c.id()).unwrap());
        let users = users_among(&children, &path).unwrap();
        for child in [&mut inside, &mut holding, &mut bystander] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(users.len(), 2, "{users:?}");
        assert!(users.iter().any(|u| u.contains("(sleep) has its working directory")), "{users:?}");
        assert!(users.iter().any(|u| u.contains("file open")), "{users:?}");
        assert_eq!(users_among(&children, &path).unwrap(), Vec::<String>::new());
    }
}
