//! The size of a mounted filesystem, and its growth to the size of its disk.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::Instant;

use super::content::{self, Reader};
use super::device::DataDevice;
use super::superblock::{self, Superblock};
use super::{command, mounts};
use crate::config::Filesystem;

/// How long the superblock may take to be read.
const READ: Duration = Duration::from_secs(30);

/// How long a filesystem may take to grow.
const GROW: Duration = Duration::from_secs(900);

/// The size in bytes of the filesystem on a disk that is mounted at `mount_point`.
pub async fn size(device: &DataDevice, filesystem: Filesystem, mount_point: &Path) -> Result<u64> {
    let (device, place) = (device.clone(), mount_point.to_path_buf());
    let read = move |deadline| match filesystem {
        Filesystem::Ext4 => {
            // Not with direct I/O: ext4 keeps its superblock in the device's own cache, and what it
            // has grown by may not have reached the disk.
            let file = device.open(OpenOptions::new().read(true))?;
            let mut head = vec![0; superblock::HEAD];
            file.read_exact_at(&mut head, 0).context("reading the superblock")?;
            Ok(of(&device, filesystem, &head)?.size)
        }
        Filesystem::Xfs => {
            // XFS keeps its superblock in a cache of its own; statvfs(3) asks that, and leaves out
            // the log, whose size never changes.
            let direct = nix::libc::O_DIRECT;
            let file = device.open(OpenOptions::new().read(true).custom_flags(direct))?;
            let mut head = vec![0; superblock::HEAD];
            Reader::new(&*file, deadline).read(0, &mut head)?;
            let log = superblock::uncounted(&of(&device, filesystem, &head)?);
            let open =
                File::open(&place).with_context(|| format!("opening {}", place.display()))?;
            let seen = nix::sys::statvfs::fstatvfs(&open)
                .with_context(|| format!("asking for the size of {}", place.display()))?;
            Ok(seen.blocks() * seen.fragment_size() + log)
        }
    };
    content::in_time(Instant::now(), READ, read).await
}

fn of(device: &DataDevice, filesystem: Filesystem, head: &[u8]) -> Result<Superblock> {
    let name = filesystem.as_str();
    Superblock::parse(head)
        .filter(|sb| sb.kind == name)
        .with_context(|| format!("{} does not carry {name}", device.path().display()))
}

/// Enlarges the filesystem of a volume that is mounted at `mount_point`. Both tools work on what is
/// mounted and lose nothing when they are interrupted.
pub async fn grow(device: &DataDevice, filesystem: Filesystem, mount_point: &Path) -> Result<()> {
    let mounted = mounts::at(mount_point)?;
    ensure!(
        matches!(&mounted[..], [mount] if mount.device == device.number()),
        "{} is not what is mounted on {}",
        device.volumes,
        mount_point.display()
    );
    let (device, place) =
        (device.path(), mount_point.to_str().context("a path that is not UTF-8")?);
    let device = device.to_str().context("a device name that is not UTF-8")?;
    match filesystem {
        Filesystem::Ext4 => command::run(command::RESIZE2FS, &[device], GROW).await?.success()?,
        Filesystem::Xfs => {
            command::run(command::XFS_GROWFS, &["-d", place], GROW).await?.success()?
        }
    };
    Ok(())
}
