//! What of Docker's data is moved, in which order with the rest, and why perhaps nothing is.

use std::path::{Path, PathBuf};

use super::{Directory, Facts, mounted_device, unit_path};
use crate::config::{Config, Migrate};
use crate::control::{Context, Fact, Unknown};
use crate::host::block::Volumes;
use crate::host::device::DataDevice;
use crate::host::migration::{self, Next, Place, Space};
use crate::host::mounts::unit_name;
use crate::host::{blocking, processes};
use crate::step::Step;

/// What has to be known before data is moved.
pub(super) async fn before_moving(
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
                _ => moved |= directory.replaceable_link().is_some(),
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

/// The data that is moved.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Whose link gives way to a directory, before anything is moved.
    links: Vec<Place>,
    /// What is moved now.
    pub(super) moved: Vec<Place>,
    /// What is erased at the end.
    pub(super) left: Vec<Place>,
    /// Mount units that are there before their time: between the copy and the switch they would show
    /// Docker the copy, with the data still beneath.
    units: Vec<PathBuf>,
    /// Whether containers have to be stopped for it.
    stop: bool,
}

impl Moves {
    pub(super) fn removes(&self, directory: &Directory) -> bool {
        self.units.contains(&unit_path(&unit_name(Path::new(directory.path), "mount")))
    }

    pub(super) fn steps(&self, facts: &Facts) -> Result<Vec<Step>, Unknown> {
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
        steps.extend(self.links.iter().map(|place| Step::ReplaceLink { place: place.clone() }));
        steps.extend(self.moved.iter().map(|place| Step::MigrateStorage { place: place.clone() }));
        Ok(steps)
    }
}

/// What is to be moved, or why nothing may be: before anything stops.
pub(super) fn moves(
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
        if directory.replaceable_link().is_some() {
            moves.links.push(place.clone());
        }
        match place.next(found) {
            Next::Refuse(why) => return Ok(Err(why)),
            Next::Nothing if found.left.is_some() => moves.left.push(place),
            Next::Nothing => {}
            // What a mount hides cannot be moved: what is mounted may be in use.
            Next::Copy | Next::Finish if is_mounted => {}
            next => {
                if config.docker.migrate == Migrate::Never {
                    return Ok(Err(format!(
                        "{} on the root disk holds data, which the mount would hide, and \
                         docker.migrate is \"never\"; move the data away",
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
    let Some(first) = moves.moved.first().or(moves.links.first()) else { return Ok(Ok(moves)) };
    let containers = facts.containers.known()?;
    if !containers.is_empty() && config.docker.migrate != Migrate::Running {
        let why = if moves.moved.is_empty() {
            "is a link, which would have to be replaced"
        } else {
            "would have to be moved from the root disk"
        };
        return Ok(Err(format!(
            "{} {why}, and containers run ({}); stop them, or set docker.migrate to \"running\"",
            first.directory.display(),
            processes::short(containers)
        )));
    }
    moves.stop = !containers.is_empty();
    if copied && let Some(lacks) = facts.space.known()?.as_ref().and_then(Space::lacks) {
        return Ok(Err(format!(
            "what Docker has on the root disk does not fit on {volumes}: {lacks}; nothing was \
             stopped; enlarge the volume, or remove what is not needed"
        )));
    }
    Ok(Ok(moves))
}
