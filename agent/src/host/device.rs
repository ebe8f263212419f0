//! The device that carries the data filesystem: opened only with the proof that it is the one that
//! was meant. Which device that is, is decided in [`crate::volume`].

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::block::{DevNum, Disk, VolumeId, Volumes};
use super::chain::{Kind, Layer};

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
    pub fn open(&self, options: &OpenOptions) -> Result<File> {
        let path = self.path();
        let file = options.open(&path).with_context(|| format!("opening {}", path.display()))?;
        self.check(&file)?;
        Ok(file)
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

/// Names, numbers and serial numbers of all layers.
fn hardware(layer: &Layer) -> Vec<(String, DevNum, Option<String>)> {
    let serial = match &layer.kind {
        Kind::Disk(disk) => disk.serial.clone(),
        _ => None,
    };
    let mut all = vec![(layer.name.clone(), layer.number, serial)];
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
    };
    DataDevice::of_disk(disk.volume_id().expect("a volume's serial number"), disk)
}
