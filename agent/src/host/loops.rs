//! A loop device for a test that needs a block device which is real and nobody's.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use super::block::{DevNum, VolumeId};
use super::chain::Layer;
use super::device::DataDevice;

/// A loop device on an empty file, until it is dropped.
pub(super) struct Loop {
    /// Its device file.
    pub(super) path: PathBuf,
    /// Its device number.
    pub(super) number: DevNum,
    _dir: tempfile::TempDir,
}

impl Loop {
    /// Of this size; none, and it is said, where this cannot be had: without root, or in a container.
    pub(super) fn new(size: u64) -> Option<Self> {
        let skipped = |why: String| {
            eprintln!("skipped: no loop device can be had here: {why}");
            None
        };
        // Where the build is: /tmp may be memory, which stands on no device.
        let above = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(above.parent().unwrap()).unwrap();
        let file = dir.path().join("disk");
        File::create(&file).unwrap().set_len(size).unwrap();
        let made = match Command::new("losetup").args(["--find", "--show"]).arg(&file).output() {
            Ok(made) if made.status.success() => made,
            Ok(made) => return skipped(format!("{made:?}")),
            Err(e) => return skipped(e.to_string()),
        };
        let path = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        let number = DevNum::of(std::fs::metadata(&path).unwrap().rdev());
        let made = Self { path, number, _dir: dir };
        match Layer::of(number) {
            Ok(_) => Some(made),
            Err(e) => skipped(format!("{e:#}")),
        }
    }

    /// It, as if a volume were there.
    pub(super) fn data_device(&self) -> DataDevice {
        let volume = VolumeId::parse("vol-0123456789abcdef0").unwrap();
        DataDevice { volumes: volume.into(), layer: Layer::of(self.number).unwrap() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let gone = Command::new("losetup").arg("--detach").arg(&self.path).status();
        assert!(gone.is_ok_and(|gone| gone.success()), "{} is left", self.path.display());
    }
}
