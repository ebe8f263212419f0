//! The device that carries the data filesystem: opened only with the proof that it is the one that
//! was meant. Which device that is, is decided in [`crate::volume`].

use std::fs::{File, OpenOptions};
use std::ops::Deref;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::block::{DevNum, Disk, VolumeId, Volumes};
use super::chain::{Kind, Layer};
use super::superblock::{self, Superblock};

/// The device that carries the data filesystem, with everything that it stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataDevice {
    /// The volumes beneath.
    pub volumes: Volumes,
    /// The device, and its layers down to the volumes' disks.
    pub layer: Layer,
}

impl DataDevice {
    /// The device of one volume: its disk.
    #[must_use]
    pub fn of_disk(volume: VolumeId, disk: Disk) -> Self {
        let layer = Layer {
            name: disk.name.clone(),
            number: disk.number,
            size: disk.size,
            kind: Kind::Disk(disk),
            on: Vec::new(),
        };
        Self { volumes: volume.into(), layer }
    }

    /// Its device number.
    #[must_use]
    pub fn number(&self) -> DevNum {
        self.layer.number
    }

    /// Its device file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.layer.name)
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layer.size
    }

    /// The one disk that it is, if nothing is in between.
    #[must_use]
    pub fn disk(&self) -> Option<&Disk> {
        match &self.layer.kind {
            Kind::Disk(disk) => Some(disk),
            _ => None,
        }
    }

    /// Opens the device file, and proves by the opened descriptor that it is this device on these
    /// disks: number, layers and serial numbers are read again.
    pub fn open(&self, options: &OpenOptions) -> Result<Held<File>> {
        let path = self.path();
        let file = options.open(&path).with_context(|| format!("opening {}", path.display()))?;
        let file = Held::new(file);
        self.check(&file)?;
        Ok(file)
    }

    /// Whether its first block is all zeros: read once, as a hint and not as a proof. Waits for the disk.
    pub fn starts_empty(&self) -> Result<bool> {
        let mut first = [0; 4096];
        let file = self.open(OpenOptions::new().read(true))?;
        file.read_exact_at(&mut first, 0)
            .with_context(|| format!("reading {}", self.path().display()))?;
        Ok(first.iter().all(|byte| *byte == 0))
    }

    /// Proves that an open descriptor is this device on these disks, see [`DataDevice::open`].
    pub fn check(&self, file: &File) -> Result<()> {
        let path = self.path();
        let meta = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
        let number = DevNum::of(meta.rdev());
        ensure!(
            meta.file_type().is_block_device() && number == self.number(),
            "{} is not the block device {}",
            path.display(),
            self.number()
        );
        // By number, not by name: this is what the kernel says of the device that is open.
        let (now, then) = (hardware(&Layer::of(number)?), hardware(&self.layer));
        ensure!(now == then, "{} is {now:?} by now, and was {then:?}", path.display());
        Ok(())
    }
}

/// The filesystem that a device carries, by its superblock; none if there is none that is known. It may
/// be mounted.
pub fn filesystem_of(layer: &Layer) -> Result<Option<Superblock>> {
    let path = Path::new("/dev").join(&layer.name);
    let doing = || format!("reading the superblock of {}", path.display());
    let file = File::open(&path).with_context(doing)?;
    let number = DevNum::of(file.metadata().with_context(doing)?.rdev());
    ensure!(
        number == layer.number,
        "{} is the device {number}, not {}",
        path.display(),
        layer.number
    );
    let mut head = [0; superblock::HEAD];
    file.read_exact_at(&mut head, 0).with_context(doing)?;
    Ok(Superblock::parse(&head))
}

/// What holds a disk open. The last to close it waits for whatever is still being read of it, which
/// is for ever where the disk does not answer (`truncate_inode_pages` in the kernel's `block/bdev.c`):
/// so that is done in a thread, and waited for only so long.
#[derive(Debug)]
pub struct Held<T: Send + 'static>(Option<T>);

/// How long a close is waited for. Within it, on a disk that answers, the disk is free for others when
/// its holder was dropped.
const CLOSE: Duration = Duration::from_secs(5);

impl<T: Send + 'static> Held<T> {
    /// Of an open file, or what has one.
    pub fn new(open: T) -> Self {
        Self(Some(open))
    }

    /// The same as another type, still held; or as it was, with an error.
    pub fn try_map<U: Send + 'static, E>(
        mut self,
        change: impl FnOnce(T) -> Result<U, (T, E)>,
    ) -> Result<Held<U>, (Self, E)> {
        let Some(open) = self.0.take() else { unreachable!("it is there until it is dropped") };
        change(open).map(Held::new).map_err(|(open, e)| (Self::new(open), e))
    }
}

impl<T: Send + 'static> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        let Some(open) = self.0.take() else { return };
        let (done, closed) = mpsc::channel();
        let close = move || {
            drop(open);
            // Nobody listens any more: it took too long.
            _ = done.send(());
        };
        // Where no thread can be had it is closed here and now: the closure is dropped.
        if std::thread::Builder::new().spawn(close).is_ok() {
            _ = closed.recv_timeout(CLOSE);
        }
    }
}

/// Names, numbers and serial numbers of all layers; and what tells disks without one apart.
fn hardware(layer: &Layer) -> Vec<(String, DevNum, Option<String>, Option<u64>)> {
    let (serial, sequence) = match &layer.kind {
        Kind::Disk(disk) => (disk.serial.clone(), disk.sequence),
        _ => (None, None),
    };
    let mut all = vec![(layer.name.clone(), layer.number, serial, sequence)];
    all.extend(layer.on.iter().flat_map(hardware));
    all
}

/// A data device of one volume, for the tests of the controls.
#[cfg(test)]
pub(crate) fn example(number: DevNum) -> DataDevice {
    let disk = Disk {
        name: "nvme1n1".into(),
        number,
        serial: Some("vol0123456789abcdef0".into()),
        model: None,
        size: 8 << 30,
        told_by: super::block::ToldBy::Serial,
        sequence: None,
    };
    DataDevice::of_disk(disk.volume_id().expect("a volume's serial number"), disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Takes its time to close.
    struct Slow(Duration, mpsc::Sender<&'static str>);

    impl Drop for Slow {
        fn drop(&mut self) {
            std::thread::sleep(self.0);
            _ = self.1.send("closed");
        }
    }

    #[test]
    fn what_is_dropped_is_closed_by_then_unless_it_hangs() {
        let (said, hears) = mpsc::channel();
        drop(Held::new(Slow(Duration::from_millis(100), said.clone())));
        assert_eq!(hears.try_recv(), Ok("closed"));
        let begun = Instant::now();
        drop(Held::new(Slow(CLOSE * 12, said)));
        assert!(begun.elapsed() < CLOSE * 3);
        assert!(hears.try_recv().is_err());
    }

    #[test]
    fn a_disk_that_became_another_is_not_opened() {
        let Some(device) = super::super::loops::Loop::new(1 << 20) else { return };
        let meant = device.data_device();
        let opened = meant.open(OpenOptions::new().read(true)).unwrap();
        meant.check(&opened).unwrap();
        let number = DevNum { minor: meant.number().minor + 1, ..meant.number() };
        let disk = |serial: &str| {
            let example = example(meant.number());
            Disk { serial: Some(serial.into()), ..example.disk().unwrap().clone() }
        };
        let other: [fn(&mut Layer, Disk, DevNum); 4] = [
            // It had a serial number, and has none now: at the top, or further down.
            |layer, disk, _| layer.kind = Kind::Disk(disk),
            |layer, disk, _| layer.on[0].kind = Kind::Disk(disk),
            |layer, _, _| layer.on.clear(),
            |layer, _, number| layer.number = number,
        ];
        for (i, change) in other.into_iter().enumerate() {
            let mut then = meant.clone();
            change(&mut then.layer, disk("vol0123456789abcdef0"), number);
            assert!(then.check(&opened).is_err(), "case {i}");
            assert!(then.open(OpenOptions::new().read(true)).is_err(), "case {i}");
        }
        let layer =
            |serial| DataDevice::of_disk(meant.volumes.ids()[0].clone(), disk(serial)).layer;
        assert_ne!(
            hardware(&layer("vol0123456789abcdef0")),
            hardware(&layer("vol0123456789abcdef1"))
        );
    }

    #[test]
    fn the_filesystem_of_a_device_is_read() {
        let Some(device) = super::super::loops::Loop::new(1 << 20) else { return };
        let layer = device.data_device().layer;
        assert_eq!(filesystem_of(&layer).unwrap(), None);
        let uuid = "f0b4e71b-1faa-5482-8fe4-ee9f5521efef";
        let made = std::process::Command::new(super::super::command::MKFS_EXT4)
            .args(["-q", "-U", uuid])
            .arg(&device.path)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        assert_eq!(filesystem_of(&layer).unwrap().unwrap().uuid.to_string(), uuid);
        let elsewhere = Layer { number: DevNum { major: 7, minor: 4095 }, ..layer };
        assert!(filesystem_of(&elsewhere).is_err());
    }

    #[test]
    fn what_cannot_be_changed_is_as_it_was() {
        let (said, hears) = mpsc::channel();
        let open = Held::new(Slow(Duration::ZERO, said));
        let Err((open, "no")) = open.try_map(|slow| Err::<(), _>((slow, "no"))) else { panic!() };
        assert!(hears.try_recv().is_err(), "it is still open");
        drop(open);
        assert_eq!(hears.try_recv(), Ok("closed"));
    }
}
