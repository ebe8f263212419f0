//! A symbolic link in the place of a storage directory of Docker's, as old recipes have it
//! (`/var/lib/docker -> /srv/docker`): where it leads, and how the directory takes its place again.
//!
//! Nothing is mounted on a link, and systemd orders nothing by one (`RequiresMountsFor=`), so that a
//! link can stand for nothing that is guaranteed. What is behind it is not copied here: a directory of
//! the same filesystem changes its place with the link, in one rename; a link to where the data belongs
//! anyway is removed. The power may be cut before or after each of these: before, nothing has happened;
//! after, the directory is in place, or the mount makes it.

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{AtFlags, FileType, RenameFlags, StatxFlags, fsync, renameat_with, statat, statx};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::block::DevNum;
use super::docker::is_circle;
use super::files;
use super::inner_links::is_remapped;
use super::migration::Place;

/// A link in the place of a storage directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// What is written in it.
    pub target: String,
    /// Where that is.
    pub leads: Leads,
}

/// Where a link leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leads {
    /// To the place on the volume where the data belongs, or to where that will be.
    Home,
    /// To a directory of Docker's on the link's own filesystem.
    Beside(PathBuf),
    /// Where hostagent leaves it, and why.
    Elsewhere(String),
}

/// What Docker (20.10 to 29) and those before it have at the top of their root directory; a directory
/// with a name such as `100000.100000` is that of remapped users.
const DOCKERS: [&str; 28] = [
    "aufs",
    "btrfs",
    "builder",
    "buildkit",
    "containerd",
    "containers",
    "devicemapper",
    "engine-id",
    "fuse-overlayfs",
    "image",
    "key.json",
    "network",
    "nuke-graph-directory.sh",
    "overlay",
    "overlay2",
    "plugins",
    "rootfs",
    "runtimes",
    "secrets",
    "swarm",
    "tls",
    "tmp",
    "tmp-old",
    "tmpmounts",
    "trust",
    "vfs",
    "volumes",
    "zfs",
];

/// Looks at the link in the place of a storage directory; none if there is no link. `device` is the
/// data volume's if it is mounted.
pub fn look(place: &Place, device: Option<DevNum>) -> Result<Option<Link>> {
    let path = &place.directory;
    let doing = || format!("looking at the link {}", path.display());
    let target = match fs::read_link(path) {
        Ok(target) => target,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
            return Ok(None);
        }
        Err(e) => return Err(e).with_context(doing),
    };
    let leads = match fs::canonicalize(path) {
        Ok(real) => leads(place, &real, device).with_context(doing)?,
        // Where nothing is yet, Docker has kept nothing.
        Err(e) if e.kind() == ErrorKind::NotFound && target == place.target => Leads::Home,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            Leads::Elsewhere("there is nothing".to_owned())
        }
        Err(e) if is_circle(&e) => Leads::Elsewhere("it leads in a circle".to_owned()),
        Err(e) => return Err(e).with_context(doing),
    };
    Ok(Some(Link { target: target.display().to_string(), leads }))
}

fn leads(place: &Place, real: &Path, device: Option<DevNum>) -> Result<Leads> {
    let meta = fs::metadata(real)?;
    let number = DevNum::of(meta.dev());
    if !meta.is_dir() {
        return Ok(Leads::Elsewhere(format!("{} is not a directory", real.display())));
    }
    if Some(number) == device {
        let home = real.file_name() == place.target.file_name()
            && parent(real).canonicalize()? == parent(&place.target).canonicalize()?;
        if home {
            return Ok(Leads::Home);
        }
    }
    let here = parent(&place.directory);
    // Not by the device number alone: one filesystem may be mounted twice, and nothing is renamed
    // from one mount to another.
    if number != DevNum::of(fs::metadata(here)?.dev()) || mount_of(real)? != mount_of(here)? {
        return Ok(Leads::Elsewhere(format!(
            "{} is on another mount than {} (device {number})",
            real.display(),
            here.display()
        )));
    }
    if let Some(name) = foreign_entry(real)? {
        return Ok(Leads::Elsewhere(format!(
            "{} holds {name}, which is not Docker's",
            real.display()
        )));
    }
    Ok(Leads::Beside(real.to_owned()))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The number of the mount that a path is on.
fn mount_of(path: &Path) -> Result<u64> {
    let stat = statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)
        .with_context(|| format!("looking at {}", path.display()))?;
    Ok(stat.stx_mnt_id)
}

/// The first entry of a directory that neither Docker nor containerd puts into its root directory.
fn foreign_entry(dir: &Path) -> Result<Option<String>> {
    let doing = || format!("listing {}", dir.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(doing)? {
        names.push(entry.with_context(doing)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names.into_iter().find(|name| {
        let is_dockers =
            DOCKERS.contains(&name.as_str()) || name.starts_with("io.containerd.") || name == "opt";
        !(is_dockers || is_remapped(name))
    }))
}

/// Puts the directory into the place of the link. Docker must be down, and nothing mounted below; that
/// nobody uses the directory is asked of `idle`.
pub fn replace(place: &Place, device: DevNum, idle: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    let Some(link) = look(place, Some(device))? else { return Ok(()) };
    let (path, target) = (place.directory.display(), &link.target);
    match link.leads {
        Leads::Elsewhere(why) => bail!("{path} is a link to {target}: {why}"),
        // The directory is made by whoever mounts there.
        Leads::Home => files::remove(&place.directory)?,
        Leads::Beside(real) => {
            idle(&real)?;
            exchange(&place.directory, &real)?;
        }
    }
    info!("{path} was a link to {target}");
    Ok(())
}

/// Exchanges a link and the directory that it leads to, and removes the link where it is then.
fn exchange(link: &Path, directory: &Path) -> Result<()> {
    let doing = || format!("putting {} in the place of {}", directory.display(), link.display());
    let (above_link, link_name) = split(link)?;
    let (above_directory, directory_name) = split(directory)?;
    renameat_with(
        &above_link,
        &*link_name,
        &above_directory,
        &*directory_name,
        RenameFlags::EXCHANGE,
    )
    .with_context(doing)?;
    fsync(&above_link).with_context(doing)?;
    fsync(&above_directory).with_context(doing)?;
    // A link to itself by now, which nobody misses: if the power is cut here, it stays.
    let stat = statat(&above_directory, &*directory_name, AtFlags::SYMLINK_NOFOLLOW)
        .with_context(doing)?;
    ensure!(
        FileType::from_raw_mode(stat.st_mode) == FileType::Symlink,
        "{} is no link",
        directory.display()
    );
    rustix::fs::unlinkat(&above_directory, &*directory_name, AtFlags::empty())
        .with_context(doing)?;
    fsync(&above_directory).with_context(doing)
}

fn split(path: &Path) -> Result<(OwnedFd, CString)> {
    let above = fs::File::open(parent(path))
        .with_context(|| format!("opening {}", parent(path).display()))?;
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    Ok((above.as_fd().try_clone_to_owned()?, CString::new(name.as_bytes())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct World {
        dir: tempfile::TempDir,
        place: Place,
    }

    impl World {
        /// A link to a directory of Docker's beside it.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap();
            for sub in ["lib", "data", "srv/docker/volumes/v", "srv/docker/231072.231072"] {
                fs::create_dir_all(path.join(sub)).unwrap();
            }
            fs::write(path.join("srv/docker/volumes/v/record"), "precious").unwrap();
            let place = Place {
                directory: path.join("lib/docker"),
                target: path.join("data/docker"),
                volumes: super::super::block::VolumeId::parse("vol-0123456789abcdef0")
                    .unwrap()
                    .into(),
            };
            let world = Self { dir, place };
            world.link("../srv/docker");
            world
        }

        fn link(&self, target: &str) {
            let _ = fs::remove_file(&self.place.directory);
            symlink(target, &self.place.directory).unwrap();
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().canonicalize().unwrap().join(path)
        }

        fn device(&self) -> DevNum {
            DevNum::of(fs::metadata(self.dir.path()).unwrap().dev())
        }

        /// As if the volume were another device: it is the same one here.
        fn look(&self) -> Leads {
            look(&self.place, Some(DevNum { major: 4095, minor: 1 })).unwrap().unwrap().leads
        }

        fn replace(&self) -> Result<()> {
            replace(&self.place, self.device(), &|_| Ok(()))
        }
    }

    #[test]
    fn where_a_link_leads_is_told() {
        let world = World::new();
        assert_eq!(world.look(), Leads::Beside(world.at("srv/docker")));
        // Through another link.
        symlink("docker", world.at("srv/alias")).unwrap();
        world.link("../srv/alias");
        assert_eq!(world.look(), Leads::Beside(world.at("srv/docker")));
        let elsewhere = |target: &str, expected: &str| {
            world.link(target);
            let Leads::Elsewhere(why) = world.look() else {
                panic!("{target}: {:?}", world.look())
            };
            assert!(why.contains(expected), "{target}: {why}");
        };
        elsewhere("../srv/none", "there is nothing");
        elsewhere("docker", "in a circle");
        elsewhere("/dev/shm", "another mount");
        elsewhere("/proc/self/status", "not a directory");
        elsewhere("../srv", "which is not Docker's");
        fs::write(world.at("srv/docker/notes.txt"), "").unwrap();
        elsewhere("../srv/docker", "holds notes.txt");
        // Where it belongs, whether that is there yet or not.
        let home = world.place.target.display().to_string();
        world.link(&home);
        assert_eq!(world.look(), Leads::Home);
        fs::create_dir(&world.place.target).unwrap();
        let seen = look(&world.place, Some(world.device())).unwrap().unwrap().leads;
        assert_eq!(seen, Leads::Home);
        // The same path, but not on the volume.
        assert!(!matches!(world.look(), Leads::Home));
        fs::remove_file(&world.place.directory).unwrap();
        assert_eq!(look(&world.place, None).unwrap(), None);
        fs::create_dir(&world.place.directory).unwrap();
        assert_eq!(look(&world.place, None).unwrap(), None);
    }

    #[test]
    fn the_directory_takes_the_place_of_the_link() {
        let world = World::new();
        let ino = fs::metadata(world.at("srv/docker")).unwrap().ino();
        world.replace().unwrap();
        let meta = fs::symlink_metadata(&world.place.directory).unwrap();
        assert!(meta.is_dir() && meta.ino() == ino);
        let record = world.place.directory.join("volumes/v/record");
        assert_eq!(fs::read_to_string(record).unwrap(), "precious");
        assert!(fs::symlink_metadata(world.at("srv/docker")).is_err());
        world.replace().unwrap();
    }

    #[test]
    fn a_link_home_is_removed_and_nothing_behind_it() {
        let world = World::new();
        fs::rename(world.at("srv/docker"), &world.place.target).unwrap();
        world.link(&world.place.target.display().to_string());
        world.replace().unwrap();
        assert!(fs::symlink_metadata(&world.place.directory).is_err());
        let record = world.place.target.join("volumes/v/record");
        assert_eq!(fs::read_to_string(record).unwrap(), "precious");
    }

    #[test]
    fn what_is_in_use_or_not_dockers_stays() {
        let world = World::new();
        let error = replace(&world.place, world.device(), &|_| bail!("in use")).unwrap_err();
        assert_eq!(error.to_string(), "in use");
        assert!(world.place.directory.is_symlink() && world.at("srv/docker/volumes").is_dir());
        fs::write(world.at("srv/docker/notes.txt"), "").unwrap();
        assert!(world.replace().is_err());
        assert!(world.place.directory.is_symlink() && world.at("srv/docker/volumes").is_dir());
    }
}
