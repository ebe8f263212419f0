//! `docker-storage`: what Docker and containerd keep is on the data volume.
//!
//! Proven by device numbers: of what is mounted on the two storage directories, and of the files
//! that the running daemons hold open. Both directories, because since Docker 29 image layers and
//! containers' writable layers are containerd's. And nothing of it is left on the root disk: what
//! Docker had there before is moved ([`crate::host::migration`]), what the mounts hide is found.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::unit_path;
use crate::config::{Config, Migrate};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::gate::{self, STORAGE};
use crate::host::beneath::{self, Hidden};
use crate::host::block::{DevNum, Volumes};
use crate::host::device::DataDevice;
use crate::host::docker::{self, HeldFile, Storage};
use crate::host::migration::{self, Found, Next, Place, Space};
use crate::host::mounts::{self, Mount, unit_name};
use crate::host::systemd::{Systemd, Unit};
use crate::host::tree::human;
use crate::host::{blocking, files, processes};
use crate::step::Step;
use crate::volume;

/// See the module.
pub struct DockerStorage;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The data volume's device.
    pub device: Fact<DataDevice>,
    /// What the gate says: why Docker may start; unknown says why it may not.
    pub gate: Fact<String>,
    /// The two storage directories.
    pub directories: Vec<Directory>,
    /// The containers that run; looked for only while there is data to be moved.
    pub containers: Fact<Vec<String>>,
    /// Whether that data fits on the volume; none while there is none, or no volume mounted.
    pub space: Fact<Option<Space>>,
    /// `containerd.service` and `docker.service`, in the order in which they start.
    pub daemons: Vec<Daemon>,
    /// `docker.socket`, which starts Docker by itself.
    pub socket: Fact<Unit>,
}

/// One storage directory.
#[derive(Debug, Serialize)]
pub struct Directory {
    /// The directory.
    pub path: &'static str,
    /// The directory on the data volume that belongs on it, by its name there.
    pub source: &'static str,
    /// What is mounted on it.
    pub mounts: Fact<Vec<Mount>>,
    /// What it holds, beneath whatever is mounted on it, and what belongs to it elsewhere.
    pub data: Fact<Found>,
    /// What the mount hides of it, if that is anybody's data.
    pub hidden: Fact<Option<Hidden>>,
    /// The content of the mount unit's file.
    pub unit_file: Fact<Option<String>>,
    /// The mount unit as systemd has it loaded.
    pub unit: Fact<Unit>,
}

/// One daemon.
#[derive(Debug, Serialize)]
pub struct Daemon {
    /// Its unit's name.
    pub name: &'static str,
    /// Its unit as systemd has it loaded.
    pub unit: Fact<Unit>,
    /// The files it holds open for writing, if it runs.
    pub held: Fact<Option<Vec<HeldFile>>>,
}

const DAEMONS: [&str; 2] = ["containerd.service", "docker.service"];
const SOCKET: &str = "docker.socket";

impl Control for DockerStorage {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "docker-storage",
        title: "Docker's and containerd's storage is on the data volume",
        why: "Images, layers, volumes and logs of containers hold patient data. They belong on the \
              encrypted volume, whatever the daemons are configured to do.",
        requires: &["boot-order", "data-mount"],
        // Docker is started last: on a host on which all else is proven, or not at all.
        acts_after: &["instance-tenancy", "sshd-port", "swap", "core-dumps", "root-volume"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let systemd = cx.host.systemd().await;
        let device = volume::find(cx).await;
        let mut directories = Vec::new();
        for (path, source) in STORAGE {
            let mounts = mounts::at(Path::new(path));
            let data = find(cx, device.as_ref(), path, source).await;
            let is_mounted = mounts.as_ref().is_ok_and(|mounts| !mounts.is_empty());
            let hidden = match &data {
                Ok(Found { old: Storage::Used(first), .. }) if is_mounted => {
                    let first = first.clone();
                    blocking(move || measure(path, &first).map(Some)).await
                }
                _ => Ok(None),
            };
            let name = unit_name(Path::new(path), "mount");
            let file = unit_path(&name);
            directories.push(Directory {
                path,
                source,
                mounts: Fact::new("/proc/self/mountinfo", mounts),
                data: Fact::new(format!("{path} and beside it"), data),
                hidden: Fact::new(format!("beneath {path}"), hidden),
                unit_file: Fact::new(file.display().to_string(), files::read_optional(&file)),
                unit: loaded(systemd.as_ref(), &name).await,
            });
        }
        let mut daemons = Vec::new();
        for name in DAEMONS {
            let unit = loaded(systemd.as_ref(), name).await;
            let held = match unit.known() {
                Ok(unit) if unit.main_pid != 0 => docker::held_files(unit.main_pid).map(Some),
                Ok(_) => Ok(None),
                Err(Unknown(why)) => Err(anyhow::anyhow!(why)),
            };
            daemons.push(Daemon { name, unit, held: Fact::new("/proc/PID/fd", held) });
        }
        let (containers, space) = before_moving(cx, device.as_ref(), &directories).await;
        Facts {
            device: Fact::new("/sys/block", device),
            gate: Fact::new("hostagent gate", gate::check(&cx.config.volume)),
            directories,
            containers,
            space,
            daemons,
            socket: loaded(systemd.as_ref(), SOCKET).await,
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let device = facts.device.known()?;
        let (volume, number) = (&device.volumes, device.number());
        let remedy = "run `hostagent provision`";
        let fail = |observed: String| {
            Ok(Verdict::fail(
                format!("Docker's and containerd's storage on {volume}"),
                observed,
                remedy,
            ))
        };
        for directory in &facts.directories {
            if let Some(wrong) = directory.wrong_mount(number)? {
                return fail(wrong);
            }
            if !directory.unit_in_force(config)? {
                return fail(format!(
                    "the mount of {} would not come back at the next boot",
                    directory.path
                ));
            }
        }
        for directory in &facts.directories {
            if let Some((observed, remedy)) = directory.left_behind()? {
                let expected =
                    format!("nothing of Docker's data on the root disk, all on {volume}");
                return Ok(Verdict::fail(expected, observed, remedy));
            }
        }
        if let Err(Unknown(why)) = facts.gate.known() {
            return fail(format!("the gate is closed: {why}"));
        }
        let mut running = Vec::new();
        for daemon in &facts.daemons {
            let unit = daemon.unit.known()?;
            if let Some(wrong) = daemon.writes_elsewhere(number)? {
                return fail(wrong);
            }
            if let Some(wrong) = daemon.starts_without_storage()? {
                return fail(wrong);
            }
            if unit.active_state == "active" {
                running.push(daemon.name);
            } else if daemon.is_wanted() {
                return fail(format!("{} is {}", daemon.name, unit.active_state));
            }
        }
        if socket_is_missing(facts)? {
            return fail(format!("{SOCKET} is enabled, and does not listen"));
        }
        Ok(Verdict::pass(match running[..] {
            [] => format!("storage is mounted from {volume}; no daemon runs"),
            _ => format!(
                "storage is mounted from {volume}, and {} write there",
                running.join(" and ")
            ),
        }))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let device = facts.device.known()?;
        let number = device.number();
        let moves = match moves(config, facts, &device.volumes)? {
            Ok(moves) => moves,
            Err(why) => return Ok(Plan::refuse(why)),
        };
        let (mut prepare, mut mount, mut reload) = (Vec::new(), Vec::new(), false);
        for directory in &facts.directories {
            if let Some(why) = directory.refusal(number)? {
                return Ok(Plan::refuse(why));
            }
            let mounted = directory.wrong_mount(number)?.is_none();
            let is_moved =
                moves.moved.iter().any(|place| place.directory == Path::new(directory.path));
            if !mounted {
                if !is_moved {
                    prepare.push(Step::MakeDirectory {
                        path: directory.source_path(config),
                        mode: 0o711,
                        volumes: device.volumes.clone(),
                    });
                }
                mount.push(Step::StartUnit { unit: unit_name(Path::new(directory.path), "mount") });
            }
            let unit = directory.unit.known()?;
            reload |= unit.need_daemon_reload;
            let content = directory.unit_content(config);
            let is_written = directory.unit_file.known()?.as_ref() == Some(&content);
            if !is_written || moves.removes(directory) {
                let path = unit_path(&unit_name(Path::new(directory.path), "mount"));
                prepare.push(Step::WriteFile { path, content, mode: 0o644 });
                // A unit that was not there is read when it is started.
                reload |= unit.exists();
            }
        }
        if reload {
            prepare.push(Step::ReloadManager);
        }

        let mut misplaced = !mount.is_empty();
        for daemon in &facts.daemons {
            let Some(file) = daemon.file_elsewhere(number)? else { continue };
            if mount.is_empty()
                && !STORAGE.iter().any(|(top, _)| Path::new(&file.path).starts_with(top))
            {
                // Started again it would write there again.
                return Ok(Plan::Contain {
                    steps: vec![Step::StopDocker],
                    why: format!(
                        "{} is told to keep its storage elsewhere ({}); remove that from its \
                         configuration or its command line",
                        daemon.name, file.path
                    ),
                });
            }
            misplaced = true;
        }
        // A daemon that writes beneath the mounts, or would see its directory replaced, is stopped.
        let mut steps = Vec::new();
        let mut up = facts.socket.known()?.is_up();
        for daemon in &facts.daemons {
            up |= daemon.unit.known()?.is_up();
        }
        if misplaced && up {
            steps.push(Step::StopDocker);
        }
        steps.extend(moves.steps(facts)?);
        steps.extend(prepare);
        steps.extend(mount);
        if let (true, Err(Unknown(why))) = (steps.is_empty(), facts.gate.known()) {
            // The storage is in place, and still the gate would not let Docker start.
            return Ok(Plan::refuse(format!("the gate is closed: {why}")));
        }
        for daemon in &facts.daemons {
            let unit = daemon.unit.known()?;
            let was_up = misplaced && unit.is_up();
            if was_up || (daemon.is_wanted() && unit.active_state != "active") {
                steps.push(Step::StartUnit { unit: daemon.name.to_owned() });
            }
        }
        // docker.service brings its socket.
        let docker = Step::StartUnit { unit: DAEMONS[1].to_owned() };
        if socket_is_missing(facts)? && !steps.contains(&docker) {
            steps.push(Step::StartUnit { unit: SOCKET.to_owned() });
        }
        // The old copy goes last: when Docker has come up on the new one.
        steps.extend(moves.left.into_iter().map(|place| Step::EraseMigrated { place }));
        if steps.is_empty() {
            for directory in &facts.directories {
                if let Some((observed, _)) = directory.left_behind()? {
                    return Ok(Plan::refuse(format!(
                        "{observed}; hostagent removes nobody's data"
                    )));
                }
            }
        }
        Ok(Plan::steps(steps))
    }
}

/// Whether the socket is to listen and does not. Where docker.service is enabled, it brings it.
fn socket_is_missing(facts: &Facts) -> Result<bool, Unknown> {
    let socket = facts.socket.known()?;
    Ok(socket.unit_file_state.starts_with("enabled") && !socket.is_up())
}

/// What is found of a storage directory, there and on the volume.
async fn find(
    cx: &Context,
    device: Result<&DataDevice, &anyhow::Error>,
    path: &'static str,
    source: &'static str,
) -> anyhow::Result<Found> {
    let device = device.map_err(|e| anyhow::anyhow!("the data volume is not known: {e:#}"))?;
    let place = place(&cx.config, path, source, &device.volumes);
    let device = mounted_device(cx, device)?;
    blocking(move || migration::look(&place, device)).await
}

/// The number of the data volume's device, if it is mounted where it should be.
fn mounted_device(cx: &Context, data: &DataDevice) -> anyhow::Result<Option<DevNum>> {
    let mounts = mounts::at(cx.config.volume.mount_point.path())?;
    Ok(mounts.last().map(|mount| mount.device).filter(|device| *device == data.number()))
}

/// What has to be known before data is moved.
async fn before_moving(
    cx: &Context,
    device: Result<&DataDevice, &anyhow::Error>,
    directories: &[Directory],
) -> (Fact<Vec<String>>, Fact<Option<Space>>) {
    let mut copied = Vec::new();
    let mut moved = false;
    if let Ok(device) = device {
        for directory in directories {
            let (Ok(mounts), Ok(found)) = (directory.mounts.known(), directory.data.known()) else {
                continue;
            };
            let place = directory.place(&cx.config, &device.volumes);
            match place.next(found) {
                Next::Copy if mounts.is_empty() => copied.push(place),
                Next::Finish if mounts.is_empty() => moved = true,
                _ => {}
            }
        }
    }
    moved |= !copied.is_empty();
    let containers = if moved { processes::containers() } else { Ok(Vec::new()) };
    let space = match device.map(|device| mounted_device(cx, device)) {
        Ok(Ok(Some(device))) if !copied.is_empty() => {
            blocking(move || migration::space(&copied.iter().collect::<Vec<_>>(), device).map(Some))
                .await
        }
        Ok(Err(e)) => Err(e),
        _ => Ok(None),
    };
    (Fact::new("/proc", containers), Fact::new("statvfs", space))
}

fn measure(path: &str, first: &str) -> anyhow::Result<Hidden> {
    use std::os::fd::AsFd as _;
    let (view, name) = beneath::parent(Path::new(path))?;
    let top = crate::host::tree::open_dir(view.as_fd(), &name)?;
    beneath::of(top, Path::new(first))
}

fn place(config: &Config, path: &str, source: &str, volumes: &Volumes) -> Place {
    Place {
        directory: path.into(),
        target: config.volume.mount_point.path().join(source),
        volumes: volumes.clone(),
    }
}

/// The data that is moved.
#[derive(Debug, Default)]
struct Moves {
    /// What is moved now.
    moved: Vec<Place>,
    /// What is erased at the end.
    left: Vec<Place>,
    /// Mount units that are there before their time: between the copy and the switch they would show
    /// Docker the copy, with the data still beneath.
    units: Vec<PathBuf>,
    /// Whether containers have to be stopped for it.
    stop: bool,
}

impl Moves {
    fn removes(&self, directory: &Directory) -> bool {
        self.units.contains(&unit_path(&unit_name(Path::new(directory.path), "mount")))
    }

    fn steps(&self, facts: &Facts) -> Result<Vec<Step>, Unknown> {
        let mut steps = Vec::new();
        if self.stop {
            steps.push(Step::StopContainers);
        }
        steps.extend(self.units.iter().map(|path| Step::RemoveFile { path: path.clone() }));
        let mut loaded = false;
        for directory in &facts.directories {
            loaded |= self.removes(directory) && directory.unit.known()?.exists();
        }
        if loaded {
            steps.push(Step::ReloadManager);
        }
        steps.extend(self.moved.iter().map(|place| Step::MigrateStorage { place: place.clone() }));
        Ok(steps)
    }
}

/// What is to be moved, or why nothing may be: before anything stops.
fn moves(
    config: &Config,
    facts: &Facts,
    volumes: &Volumes,
) -> Result<Result<Moves, String>, Unknown> {
    let mut moves = Moves::default();
    let mut copied = false;
    for directory in &facts.directories {
        let found = directory.data.known()?;
        let place = directory.place(config, volumes);
        let is_mounted = !directory.mounts.known()?.is_empty();
        match place.next(found) {
            Next::Refuse(why) => return Ok(Err(why)),
            Next::Nothing if found.left.is_some() => moves.left.push(place),
            Next::Nothing => {}
            // What a mount hides cannot be moved: what is mounted may be in use.
            Next::Copy | Next::Finish if is_mounted => {}
            next => {
                if config.docker.migrate == Migrate::Never {
                    return Ok(Err(format!(
                        "{} on the root disk holds data, which the mount would hide, and                          docker.migrate is \"never\"; move the data away",
                        directory.path
                    )));
                }
                copied |= next == Next::Copy;
                if directory.unit_file.known()?.is_some() {
                    moves.units.push(unit_path(&unit_name(Path::new(directory.path), "mount")));
                }
                moves.left.push(place.clone());
                moves.moved.push(place);
            }
        }
    }
    if moves.moved.is_empty() {
        return Ok(Ok(moves));
    }
    let containers = facts.containers.known()?;
    if !containers.is_empty() && config.docker.migrate != Migrate::Running {
        let ids: Vec<&str> = containers.iter().map(|id| id.get(..12).unwrap_or(id)).collect();
        return Ok(Err(format!(
            "{} would have to be moved from the root disk, and containers run ({}); stop them, or              set docker.migrate to \"running\"",
            moves.moved[0].directory.display(),
            ids.join(", ")
        )));
    }
    moves.stop = !containers.is_empty();
    if copied && let Some(lacks) = facts.space.known()?.as_ref().and_then(Space::lacks) {
        return Ok(Err(format!(
            "what Docker has on the root disk does not fit on {volumes}: {lacks}; nothing was              stopped; enlarge the volume, or remove what is not needed"
        )));
    }
    Ok(Ok(moves))
}

async fn loaded(systemd: Result<&&Systemd, &anyhow::Error>, name: &str) -> Fact<Unit> {
    let result = match systemd {
        Ok(systemd) => systemd.unit(name).await,
        Err(e) => Err(anyhow::anyhow!("{e:#}")),
    };
    Fact::new("systemd (D-Bus)", result)
}

impl Directory {
    fn place(&self, config: &Config, volumes: &Volumes) -> Place {
        place(config, self.path, self.source, volumes)
    }

    /// What of Docker's data is on the root disk although the volume is mounted, and what to do.
    fn left_behind(&self) -> Result<Option<(String, String)>, Unknown> {
        let (path, found) = (self.path, self.data.known()?);
        if let Some(hidden) = self.hidden.known()? {
            let (size, inodes) = (human(hidden.usage.bytes), hidden.usage.inodes);
            return Ok(Some((
                format!(
                    "beneath the mount on {path} the root disk holds data: {} and more, {size} in \
                     {inodes} files",
                    hidden.path
                ),
                format!(
                    "look at it with `mount --bind / /mnt` in /mnt{path}, move it away or remove it, \
                     and `umount /mnt`"
                ),
            )));
        }
        if let Some(left) = &found.left {
            return Ok(Some((
                format!(
                    "the old copy of {path} is still on the root disk: {}",
                    left.path.display()
                ),
                "run `hostagent provision`, which overwrites and removes it".to_owned(),
            )));
        }
        Ok(found.others.first().map(|other| {
            (
                format!(
                    "an old copy of {path} is on the root disk, of which another volume has the \
                         new one: {other}"
                ),
                "if that volume has all that is needed, overwrite and remove it".to_owned(),
            )
        }))
    }

    /// What is wrong with what is mounted on the directory, if anything is.
    fn wrong_mount(&self, device: DevNum) -> Result<Option<String>, Unknown> {
        let path = self.path;
        Ok(match &self.mounts.known()?[..] {
            [] => Some(match self.data.known() {
                Ok(Found { old: Storage::Used(what), .. }) => {
                    format!("{path} is on the root disk, and holds data ({what})")
                }
                _ => format!("{path} is on the root disk"),
            }),
            [mount] if mount.device != device => {
                Some(format!("{path} is on the device {}, not on {device}", mount.device))
            }
            [mount] if mount.root != format!("/{}", self.source) => {
                Some(format!("{path} shows the directory {} of the data volume", mount.root))
            }
            [_] => None,
            more => Some(format!("{} mounts are stacked on {path}", more.len())),
        })
    }

    /// Why hostagent leaves the directory alone, if it must.
    fn refusal(&self, device: DevNum) -> Result<Option<String>, Unknown> {
        let path = self.path;
        if !self.mounts.known()?.is_empty() {
            return Ok(self
                .wrong_mount(device)?
                .map(|wrong| format!("{wrong}; unmount it, and see what mounts it")));
        }
        Ok(match &self.data.known()?.old {
            Storage::Absent | Storage::Unused | Storage::Used(_) => None,
            Storage::Symlink(target) => {
                Some(format!("{path} is a link to {target}; stop Docker and remove the link"))
            }
            Storage::NotADirectory => Some(format!("{path} is not a directory")),
        })
    }

    fn source_path(&self, config: &Config) -> PathBuf {
        config.volume.mount_point.path().join(self.source)
    }

    /// Whether the unit that systemd has loaded is the one that hostagent writes.
    fn unit_in_force(&self, config: &Config) -> Result<bool, Unknown> {
        let unit = self.unit.known()?;
        Ok(self.unit_file.known()?.as_ref() == Some(&self.unit_content(config))
            && Path::new(&unit.fragment_path)
                == unit_path(&unit_name(Path::new(self.path), "mount"))
            && !unit.need_daemon_reload)
    }

    fn unit_content(&self, config: &Config) -> String {
        format!(
            "# Written by hostagent (control docker-storage). Changes are overwritten.\n\
             [Unit]\n\
             Description={path} on the encrypted data volume\n\
             Documentation=file:/usr/share/doc/hostagent/README.md\n\
             # Without the volume this would show a directory of the root disk: never without it.\n\
             RequiresMountsFor={place}\n\
             \n\
             [Mount]\n\
             What={source}\n\
             Where={path}\n\
             Type=none\n\
             # nofail: not ordered before local-fs.target, so that a missing volume cannot stop the boot.\n\
             Options=bind,nofail\n",
            path = self.path,
            place = config.volume.mount_point,
            source = self.source_path(config).display(),
        )
    }
}

impl Daemon {
    /// Whether it is to run: enabled, so that it starts at boot.
    fn is_wanted(&self) -> bool {
        self.unit.known().is_ok_and(|unit| unit.unit_file_state.starts_with("enabled"))
    }

    /// The mount that the daemon's start does not depend on, if there is one.
    fn starts_without_storage(&self) -> Result<Option<String>, Unknown> {
        let unit = self.unit.known()?;
        if unit.load_state != "loaded" {
            return Ok(None);
        }
        let mounts = STORAGE.map(|(path, _)| unit_name(Path::new(path), "mount"));
        let missing =
            mounts.into_iter().find(|m| !(unit.requires.contains(m) && unit.after.contains(m)));
        Ok(missing.map(|mount| format!("{} does not wait for {mount}", self.name)))
    }

    /// The first file that the daemon holds open for writing off the data volume, if it runs.
    fn file_elsewhere(&self, device: DevNum) -> Result<Option<&HeldFile>, Unknown> {
        if !self.unit.known()?.is_up() {
            return Ok(None);
        }
        let Some(held) = self.held.known()? else { return Ok(None) };
        Ok(held.iter().find(|file| file.device != device))
    }

    /// What is wrong with where the running daemon writes, if anything is.
    fn writes_elsewhere(&self, device: DevNum) -> Result<Option<String>, Unknown> {
        if let Some(file) = self.file_elsewhere(device)? {
            return Ok(Some(format!(
                "{} writes {} on the device {}, not on {device}",
                self.name, file.path, file.device
            )));
        }
        let nothing_held = self.held.known()?.as_ref().is_none_or(Vec::is_empty);
        if self.unit.known()?.active_state == "active" && nothing_held {
            return Err(Unknown(format!(
                "{} holds no file open, so where it writes is not known",
                self.name
            )));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::migration::Left;
    use crate::host::tree::Usage;
    use anyhow::anyhow;

    const DATA: DevNum = DevNum { major: 259, minor: 1 };
    const ROOT: DevNum = DevNum { major: 254, minor: 0 };

    fn unit(active: &str, enabled: &str) -> Unit {
        Unit {
            load_state: "loaded".into(),
            active_state: active.into(),
            unit_file_state: enabled.into(),
            main_pid: u32::from(active == "active") * 7,
            requires: STORAGE.map(|(path, _)| unit_name(Path::new(path), "mount")).into(),
            after: STORAGE.map(|(path, _)| unit_name(Path::new(path), "mount")).into(),
            ..Unit::default()
        }
    }

    fn held(name: &str, device: DevNum) -> HeldFile {
        HeldFile { path: format!("/var/lib/{name}/meta.db"), device }
    }

    fn found(old: Storage) -> Found {
        Found {
            old,
            old_mark: None,
            new: Some(Storage::Absent),
            new_mark: None,
            incoming: false,
            left: None,
            others: vec![],
        }
    }

    /// Docker with data on the root disk, and a volume that it fits on.
    fn used() -> Facts {
        let mut facts = fresh();
        let data = Storage::Used("/var/lib/docker/volumes/v".into());
        facts.directories[0].data = Fact::new("t", Ok(found(data)));
        facts.space = space(1, 8);
        facts
    }

    fn space(needed: u64, free: u64) -> Fact<Option<Space>> {
        let usage = |gib: u64| Usage { bytes: gib << 30, inodes: gib * 100_000 };
        Fact::new("t", Ok(Some(Space { needed: usage(needed), free: usage(free) })))
    }

    /// A fresh host on which Docker has started on the root disk.
    fn fresh() -> Facts {
        let directory = |(path, source)| Directory {
            path,
            source,
            mounts: Fact::new("t", Ok(vec![])),
            data: Fact::new("t", Ok(found(Storage::Unused))),
            hidden: Fact::new("t", Ok(None)),
            unit_file: Fact::new("t", Ok(None)),
            unit: Fact::new("t", Ok(Unit { load_state: "not-found".into(), ..Unit::default() })),
        };
        let daemon = |name: &'static str| Daemon {
            name,
            unit: Fact::new("t", Ok(unit("active", "enabled"))),
            held: Fact::new("t", Ok(Some(vec![held(name, ROOT)]))),
        };
        Facts {
            device: Fact::new("t", Ok(crate::host::device::example(DATA))),
            gate: Fact::new("t", Err(anyhow!("nothing is mounted on /data"))),
            directories: STORAGE.map(directory).into(),
            containers: Fact::new("t", Ok(vec![])),
            space: Fact::new("t", Ok(None)),
            daemons: DAEMONS.map(daemon).into(),
            socket: Fact::new("t", Ok(unit("active", "enabled"))),
        }
    }

    fn ready() -> Facts {
        let mut facts = fresh();
        facts.gate = Fact::new("t", Ok("open".into()));
        for directory in &mut facts.directories {
            let path = unit_path(&unit_name(Path::new(directory.path), "mount"));
            directory.mounts = Fact::new(
                "t",
                Ok(vec![Mount {
                    device: DATA,
                    root: format!("/{}", directory.source),
                    mount_point: directory.path.into(),
                    fs_type: "ext4".into(),
                    options: vec![],
                    read_only: false,
                }]),
            );
            directory.unit_file =
                Fact::new("t", Ok(Some(directory.unit_content(&Config::default()))));
            directory.unit = Fact::new(
                "t",
                Ok(Unit { fragment_path: path.display().to_string(), ..unit("active", "static") }),
            );
        }
        for daemon in &mut facts.daemons {
            daemon.held = Fact::new("t", Ok(Some(vec![held(daemon.name, DATA)])));
        }
        facts
    }

    fn judge(facts: &Facts) -> String {
        match DockerStorage.judge(&Config::default(), facts) {
            Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    fn plan(facts: &Facts) -> Vec<String> {
        match DockerStorage.plan(&Config::default(), facts) {
            Ok(Plan::Steps(steps)) => steps.iter().map(ToString::to_string).collect(),
            Ok(Plan::Nothing) => vec![],
            Ok(Plan::Refuse { why } | Plan::Contain { why, .. }) => vec![format!("refuse: {why}")],
            Err(Unknown(why)) => vec![format!("unknown: {why}")],
        }
    }

    #[test]
    fn a_ready_host_passes_and_needs_nothing() {
        assert!(judge(&ready()).starts_with("pass"), "{}", judge(&ready()));
        assert_eq!(plan(&ready()), Vec::<String>::new());
    }

    #[test]
    fn docker_stands_still_while_its_storage_moves() {
        assert_eq!(
            plan(&fresh()),
            [
                "stop Docker and containerd",
                "make the directory /data/docker (mode 0711)",
                "write /etc/systemd/system/var-lib-docker.mount",
                "make the directory /data/containerd (mode 0711)",
                "write /etc/systemd/system/var-lib-containerd.mount",
                "start var-lib-docker.mount",
                "start var-lib-containerd.mount",
                "start containerd.service",
                "start docker.service",
            ]
        );
    }

    #[test]
    fn docker_is_started_only_through_an_open_gate() {
        let mut mounted = ready();
        for daemon in &mut mounted.daemons {
            daemon.unit = Fact::new("t", Ok(unit("inactive", "enabled")));
            daemon.held = Fact::new("t", Ok(None));
        }
        assert_eq!(plan(&mounted), ["start containerd.service", "start docker.service"]);
        mounted.gate = Fact::new("t", Err(anyhow!("daemon.json sets data-root")));
        assert!(plan(&mounted)[0].starts_with("refuse: the gate is closed"));
    }

    type Break = fn(&mut Facts);

    #[test]
    fn anything_off_the_volume_fails() {
        let cases: [(&str, Break); 10] = [
            ("fail", |f| f.gate = Fact::new("t", Err(anyhow!("daemon.json sets data-root")))),
            ("fail", |f| {
                f.daemons[1].unit =
                    Fact::new("t", Ok(Unit { after: vec![], ..unit("active", "enabled") }));
            }),
            ("fail", |f| f.directories[0].mounts = Fact::new("t", Ok(vec![]))),
            ("fail", |f| f.directories[1].mounts = Fact::new("t", Ok(vec![]))),
            ("fail", |f| f.daemons[0].held = Fact::new("t", Ok(Some(vec![held("x", ROOT)])))),
            ("fail", |f| {
                f.daemons[1].held =
                    Fact::new("t", Ok(Some(vec![held("x", DATA), held("y", ROOT)])));
            }),
            ("fail", |f| f.daemons[1].unit = Fact::new("t", Ok(unit("failed", "enabled")))),
            ("fail", |f| f.directories[0].unit_file = Fact::new("t", Ok(None))),
            ("unknown", |f| f.daemons[0].held = Fact::new("t", Ok(Some(vec![])))),
            ("unknown", |f| f.daemons[1].held = Fact::new("t", Err(anyhow!("EACCES")))),
        ];
        for (i, (expected, break_it)) in cases.into_iter().enumerate() {
            let mut facts = ready();
            break_it(&mut facts);
            assert!(judge(&facts).starts_with(expected), "case {i}: {}", judge(&facts));
        }
    }

    #[test]
    fn a_daemon_that_started_before_the_mount_is_restarted() {
        let mut facts = ready();
        facts.daemons[1].held = Fact::new("t", Ok(Some(vec![held("docker", ROOT)])));
        let steps = plan(&facts);
        assert_eq!(steps.first().map(String::as_str), Some("stop Docker and containerd"));
        assert_eq!(steps.last().map(String::as_str), Some("start docker.service"));
    }

    #[test]
    fn a_daemon_that_is_told_to_write_elsewhere_is_stopped_and_not_started() {
        let mut facts = ready();
        let file = HeldFile { path: "/mnt/x/volumes/metadata.db".into(), device: ROOT };
        facts.daemons[1].held = Fact::new("t", Ok(Some(vec![held("docker", DATA), file])));
        assert!(judge(&facts).starts_with("fail"));
        let plan = DockerStorage.plan(&Config::default(), &facts).unwrap();
        assert!(matches!(plan, Plan::Contain { steps, .. } if steps == [Step::StopDocker]));
    }

    #[test]
    fn somebodys_data_is_never_hidden() {
        for storage in [Storage::Symlink("/data/docker".into()), Storage::NotADirectory] {
            let mut facts = fresh();
            facts.directories[0].data = Fact::new("t", Ok(found(storage)));
            assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));
        }
        let mut facts = fresh();
        facts.directories[0].data = Fact::new("t", Err(anyhow!("EIO")));
        assert!(plan(&facts)[0].starts_with("unknown"));
    }

    #[test]
    fn data_is_moved_before_anything_is_mounted_and_erased_after_docker_has_come_up() {
        assert!(judge(&used()).starts_with("fail: /var/lib/docker is on the root disk, and holds"));
        assert_eq!(
            plan(&used()),
            [
                "stop Docker and containerd",
                "move the data of /var/lib/docker to /data/docker on vol-0123456789abcdef0",
                "write /etc/systemd/system/var-lib-docker.mount",
                "make the directory /data/containerd (mode 0711)",
                "write /etc/systemd/system/var-lib-containerd.mount",
                "start var-lib-docker.mount",
                "start var-lib-containerd.mount",
                "start containerd.service",
                "start docker.service",
                "overwrite and remove the old copy \
                 /var/lib/.hostagent-migrated-docker-vol-0123456789abcdef0",
            ]
        );
        // A unit from before would mount an unfinished copy at the next boot.
        let mut facts = used();
        let content = facts.directories[0].unit_content(&Config::default());
        facts.directories[0].unit_file = Fact::new("t", Ok(Some(content)));
        facts.directories[0].unit = Fact::new("t", Ok(unit("inactive", "static")));
        let steps = plan(&facts);
        let at = |text: &str| steps.iter().position(|step| step.contains(text));
        let remove = at("remove /etc/systemd/system/var-lib-docker.mount");
        assert!(remove.is_some() && remove < at("move the data"), "{steps:?}");
        assert!(at("move the data") < at("write /etc/systemd/system/var-lib-docker"), "{steps:?}");
    }

    #[test]
    fn what_cannot_be_moved_is_refused_before_anything_stops() {
        let cases: [(&str, Break); 5] = [
            ("containers run (0123456789ab)", |f| {
                f.containers = Fact::new("t", Ok(vec!["0123456789abcdef".into()]));
            }),
            ("does not fit on vol-", |f| f.space = space(8, 8)),
            ("and so does /data/docker", |f| {
                let mut found = f.directories[0].data.known().unwrap().clone();
                found.new = Some(Storage::Used("/data/docker/volumes/v".into()));
                f.directories[0].data = Fact::new("t", Ok(found));
            }),
            ("EIO", |f| f.containers = Fact::new("t", Err(anyhow!("EIO")))),
            ("EIO", |f| f.space = Fact::new("t", Err(anyhow!("EIO")))),
        ];
        for (expected, break_it) in cases {
            let mut facts = used();
            break_it(&mut facts);
            let steps = plan(&facts);
            assert!(steps.len() == 1 && steps[0].contains(expected), "{expected}: {steps:?}");
            assert!(!steps[0].starts_with("stop"), "{steps:?}");
        }
        let never = config(Migrate::Never);
        let refusal = DockerStorage.plan(&never, &used());
        assert!(matches!(refusal, Ok(Plan::Refuse { .. })), "{refusal:?}");
    }

    fn config(migrate: Migrate) -> Config {
        let docker = crate::config::Docker { migrate, ..crate::config::Docker::default() };
        Config { docker, ..Config::default() }
    }

    #[test]
    fn containers_are_stopped_where_that_is_wanted() {
        let mut facts = used();
        facts.containers = Fact::new("t", Ok(vec!["0123456789abcdef".into()]));
        let Ok(Plan::Steps(steps)) = DockerStorage.plan(&config(Migrate::Running), &facts) else {
            panic!()
        };
        assert_eq!(steps[..2], [Step::StopDocker, Step::StopContainers]);
        assert!(matches!(steps[2], Step::MigrateStorage { .. }));
    }

    #[test]
    fn what_is_left_on_the_root_disk_fails() {
        let left = |mark: &str| {
            let path = "/var/lib/.hostagent-migrated-docker-vol-0123456789abcdef0".into();
            let mut found = found(Storage::Absent);
            found.new = Some(Storage::Used("/data/docker/volumes/v".into()));
            found.new_mark = Some("m".into());
            found.left = Some(Left { path, mark: Some(mark.into()) });
            found
        };
        let mut facts = ready();
        facts.directories[0].data = Fact::new("t", Ok(left("m")));
        assert!(judge(&facts).starts_with("fail: the old copy of /var/lib/docker is still"));
        let steps = plan(&facts);
        assert!(steps.len() == 1 && steps[0].starts_with("overwrite and remove"), "{steps:?}");
        // Not proven to be a copy: not erased.
        facts.directories[0].data = Fact::new("t", Ok(left("n")));
        assert!(judge(&facts).starts_with("fail"), "{}", judge(&facts));
        assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));

        let mut facts = ready();
        let mut other = found(Storage::Absent);
        other.others = vec!["/var/lib/.hostagent-migrated-docker-vol-0ffffffff".into()];
        facts.directories[0].data = Fact::new("t", Ok(other));
        assert!(judge(&facts).contains("another volume"), "{}", judge(&facts));
        assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));
    }

    #[test]
    fn data_beneath_a_mount_fails_and_is_not_touched() {
        let mut facts = ready();
        let first = "/var/lib/docker/volumes/v";
        facts.directories[0].data = Fact::new("t", Ok(found(Storage::Used(first.into()))));
        let usage = Usage { bytes: 3 << 20, inodes: 7 };
        facts.directories[0].hidden =
            Fact::new("t", Ok(Some(Hidden { path: first.into(), usage })));
        assert_eq!(
            judge(&facts),
            "fail: beneath the mount on /var/lib/docker the root disk holds data: \
             /var/lib/docker/volumes/v and more, 3.0 MiB in 7 files"
        );
        assert!(plan(&facts)[0].starts_with("refuse: beneath"), "{:?}", plan(&facts));
        facts.directories[0].data = Fact::new("t", Err(anyhow!("EPERM")));
        assert!(judge(&facts).starts_with("unknown"), "what cannot be looked at is not empty");
    }

    #[test]
    fn docker_that_is_not_installed_needs_only_its_place() {
        let mut facts = ready();
        for daemon in &mut facts.daemons {
            daemon.unit = Fact::new(
                "t",
                Ok(Unit {
                    load_state: "not-found".into(),
                    active_state: "inactive".into(),
                    ..Unit::default()
                }),
            );
            daemon.held = Fact::new("t", Ok(None));
        }
        assert!(judge(&facts).starts_with("pass"), "{}", judge(&facts));
    }
}
