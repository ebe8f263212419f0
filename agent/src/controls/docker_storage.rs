//! `docker-storage`: what Docker and containerd keep is on the data volume.
//!
//! Proven by device numbers: of what is mounted on the two storage directories, and of the files
//! that the running daemons hold open. Both directories, because since Docker 29 image layers and
//! containers' writable layers are containerd's. And nothing of it is left on the root disk: what
//! Docker had there before is moved ([`crate::host::migration`]), what the mounts hide is found.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{docker_daemon, unit_path};
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::gate::{self, STORAGE};
use crate::host::beneath::{self, Hidden};
use crate::host::block::{DevNum, Volumes};
use crate::host::device::DataDevice;
use crate::host::docker::{self, HeldFile, Storage};
use crate::host::dockerd::{self, AtStart};
use crate::host::link::{Leads, Link};
use crate::host::migration::{self, Found, Place, Space};
use crate::host::mounts::{self, Mount, unit_name};
use crate::host::systemd::{Systemd, Unit};
use crate::host::tree::human;
use crate::host::{blocking, files};
use crate::step::Step;
use crate::volume;

mod moves;
pub(super) mod next_start;

use moves::{before_moving, moves};

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
    /// What Docker would be started with; none where that is not to be changed.
    pub at_start: Fact<Option<AtStart>>,
    /// What the next start of a daemon would keep off the volume, by its unit; none if nothing.
    pub off_volume: Fact<Option<String>>,
    /// What there is of a Docker that is installed as a snap, if there is one.
    pub snap: Fact<Option<String>>,
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

const DAEMONS: [&str; 2] = ["containerd.service", DOCKER];
const DOCKER: &str = dockerd::SERVICE;
const SOCKET: &str = dockerd::SOCKET;

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
            at_start: docker_daemon::before_start(cx).await,
            off_volume: next_start::off_volume(cx).await,
            snap: snap(systemd.as_ref()).await,
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
        if let Some(what) = facts.snap.known()? {
            return Ok(Verdict::fail(
                "no Docker but the one whose storage can be on the volume",
                format!("Docker is installed as a snap: {what} ({SNAP_KEEPS})"),
                "move what it holds away, `snap remove docker`, and install Docker from a package",
            ));
        }
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
                if let Ok(Some(what)) = facts.off_volume.known() {
                    return Ok(next_start::would_leave(volume, what));
                }
                return fail(format!("{} is {}", daemon.name, unit.active_state));
            }
        }
        if let Some(what) = facts.off_volume.known()? {
            return Ok(next_start::would_leave(volume, what));
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
        if let Some(what) = facts.snap.known()? {
            return Ok(Plan::refuse(format!("Docker is a snap ({what}): {SNAP_KEEPS}")));
        }
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
        let stop = misplaced && up;
        if let Some(plan) = next_start::refusal(facts, stop)? {
            return Ok(plan);
        }
        steps.extend(stop.then_some(Step::StopDocker));
        steps.extend(moves.steps(facts)?);
        steps.extend(prepare);
        steps.extend(mount);
        if let (true, Err(Unknown(why))) = (steps.is_empty(), facts.gate.known()) {
            // The storage is in place, and still the gate would not let Docker start.
            return Ok(Plan::refuse(format!("the gate is closed: {why}")));
        }
        let mut docker_starts = false;
        for daemon in &facts.daemons {
            let unit = daemon.unit.known()?;
            let was_up = misplaced && unit.is_up();
            if was_up || (daemon.is_wanted() && unit.active_state != "active") {
                steps.push(match daemon.name {
                    // Once, with all that is asked of it.
                    DOCKER => docker_daemon::start(&facts.at_start),
                    name => Step::StartUnit { unit: name.to_owned() },
                });
                docker_starts |= daemon.name == DOCKER;
            }
        }
        // docker.service brings its socket.
        if socket_is_missing(facts)? && !docker_starts {
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

/// The unit and the directory that a Docker from snapcraft.io has.
const SNAP_UNIT: &str = "snap.docker.dockerd.service";
const SNAP_DIRECTORY: &str = "/snap/docker";

/// Why such a Docker is refused.
const SNAP_KEEPS: &str = "it keeps its data in /var/snap/docker on the root disk, runs without the \
                          gate, and may not use other directories";

/// What there is of a Docker that is installed as a snap.
async fn snap(systemd: Result<&&Systemd, &anyhow::Error>) -> Fact<Option<String>> {
    let unit = loaded(systemd, SNAP_UNIT).await;
    let result = match unit.known() {
        Ok(unit) if unit.exists() => Ok(Some(SNAP_UNIT.to_owned())),
        Ok(_) => match files::place(Path::new(SNAP_DIRECTORY)) {
            Ok(files::Place::Absent) => Ok(None),
            Ok(_) => Ok(Some(SNAP_DIRECTORY.to_owned())),
            Err(e) => Err(e),
        },
        Err(Unknown(why)) => Err(anyhow::anyhow!(why)),
    };
    Fact::new("systemd (D-Bus), /snap", result)
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

    /// The link in the directory's place, if it can be replaced.
    fn replaceable_link(&self) -> Option<&Link> {
        let link = self.data.known().ok()?.link.as_ref()?;
        (!matches!(link.leads, Leads::Elsewhere(_))).then_some(link)
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
                Ok(Found { link: Some(link), .. }) => {
                    format!("{path} is a link to {}, and not on the volume by a mount", link.target)
                }
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
        let found = self.data.known()?;
        if let Some(Link { target, leads: Leads::Elsewhere(why) }) = &found.link {
            return Ok(Some(format!(
                "{path} is a link to {target}: {why}; stop Docker, move what it has there to {path} \
                 in the place of the link, and hostagent moves it to the volume"
            )));
        }
        Ok(match &found.old {
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
mod tests;
