//! `data-size`: the filesystem on the data volume is as large as the volume, which may have been
//! enlarged since it was made.

use anyhow::Result;
use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::device::DataDevice;
use crate::host::growth;
use crate::step::Step;
use crate::volume;

/// See the module.
pub struct DataSize;

/// What a filesystem may leave unused at the end of its disk: one that would be too small for
/// another group of blocks. EBS volumes grow by whole gibibytes.
const SLACK: u64 = 64 << 20;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The data volume's device.
    pub device: Fact<DataDevice>,
    /// The size in bytes of the mounted filesystem.
    pub size: Fact<u64>,
}

impl Control for DataSize {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "data-size",
        title: "The filesystem is as large as its volume",
        why: "A volume that was enlarged because it was full is still full until its filesystem has \
              grown too. That is done only where volume.grow says so.",
        requires: &["data-mount"],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let config = &cx.config.volume;
        let device = volume::find(cx).await;
        let size = match &device {
            Ok(device) => growth::size(device, config.filesystem, config.mount_point.path()).await,
            Err(_) => Err(anyhow::anyhow!("the data volume's device is not known")),
        };
        Facts {
            device: Fact::new("/sys/block", device),
            size: Fact::new("the superblock, and statvfs", size),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let (device, size) = (facts.device.known()?, *facts.size.known()?);
        let (id, whole) = (&device.volumes, device.size());
        let seen = format!("the filesystem has {} of the {} of {id}", human(size), human(whole));
        if size > whole {
            return Ok(Verdict::fail(
                "a filesystem that is not larger than its volume",
                seen,
                "attach the whole volume; a volume never shrinks by itself",
            ));
        }
        if whole - size < SLACK {
            return Ok(Verdict::pass(format!("the filesystem has all {} of {id}", human(whole))));
        }
        if !config.volume.grow {
            return Ok(Verdict::NotApplicable {
                why: format!("{seen}, and volume.grow is not set"),
            });
        }
        let expected = format!("a filesystem as large as {id} ({})", human(whole));
        Ok(Verdict::fail(expected, seen, "run `hostagent provision`"))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let (device, size) = (facts.device.known()?, *facts.size.known()?);
        let volume = &config.volume;
        if !volume.grow || device.size().saturating_sub(size) < SLACK {
            return Ok(Plan::Nothing);
        }
        Ok(Plan::Steps(vec![Step::GrowFilesystem {
            volumes: device.volumes.clone(),
            filesystem: volume.filesystem,
            mount_point: volume.mount_point.path().to_path_buf(),
        }]))
    }
}

/// A size as it is read: whole gibibytes as such, others in mebibytes.
fn human(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) {
        format!("{} GiB", bytes >> 30)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::DevNum;
    use anyhow::anyhow;

    const GIB: u64 = 1 << 30;

    fn outcome(grow: bool, disk: Result<u64>, size: Result<u64>) -> (&'static str, &'static str) {
        let mut config = Config::default();
        config.volume.grow = grow;
        let device = disk.map(|size| {
            let mut device = crate::host::device::example(DevNum { major: 259, minor: 1 });
            device.layer.size = size;
            device
        });
        let facts = Facts { device: Fact::new("t", device), size: Fact::new("t", size) };
        let word = DataSize.judge(&config, &facts).map_or("unknown", |v| v.word());
        let plan = match DataSize.plan(&config, &facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(steps)) => match &steps[..] {
                [Step::GrowFilesystem { .. }] => "grow",
                other => panic!("{other:?}"),
            },
            _ => "refuse",
        };
        (word, plan)
    }

    #[test]
    fn it_grows_only_when_configured_and_only_when_smaller() {
        let table = [
            (false, Ok(8 * GIB), Ok(8 * GIB), ("pass", "nothing")),
            (true, Ok(8 * GIB), Ok(8 * GIB), ("pass", "nothing")),
            (true, Ok(8 * GIB), Ok(8 * GIB - SLACK + 1), ("pass", "nothing")),
            (false, Ok(9 * GIB), Ok(8 * GIB), ("not-applicable", "nothing")),
            (true, Ok(9 * GIB), Ok(8 * GIB), ("fail", "grow")),
            (true, Ok(7 * GIB), Ok(8 * GIB), ("fail", "nothing")),
            (true, Err(anyhow!("x")), Ok(8 * GIB), ("unknown", "refuse")),
            (true, Ok(8 * GIB), Err(anyhow!("EIO")), ("unknown", "refuse")),
            (false, Ok(8 * GIB), Err(anyhow!("EIO")), ("unknown", "refuse")),
        ];
        for (i, (grow, disk, size, expected)) in table.into_iter().enumerate() {
            assert_eq!(outcome(grow, disk, size), expected, "row {i}");
        }
    }
}
