//! `data-volume`: the configured EBS volume is attached, encrypted with an accepted key, and the
//! kernel has its disk.
//!
//! Which volume is meant is decided by EC2's mapping of the configured device name to a volume id;
//! which disk that is, by the disk's serial number. What is on the disk is not this control's
//! business.

use std::path::Path;

use serde::Serialize;

use crate::aws::cache::{self, Confirmation, Confirmed};
use crate::aws::ec2::AttachedVolume;
use crate::aws::imds::Identity;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, Disk, ToldBy};
use crate::host::chain::{self, Layer};
use crate::host::identity;
use crate::host::mounts::{self, Mount};
use crate::step::Step;
use crate::volume::{self, Fit, Known, Misfit, State};

/// See the module.
pub struct DataVolume;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which instance this is.
    pub identity: Fact<Identity>,
    /// This boot.
    pub boot_id: Fact<String>,
    /// The volumes that EC2 has attached to it.
    pub attached: Fact<Vec<AttachedVolume>>,
    /// The kernel's disks.
    pub disks: Fact<Vec<Disk>>,
    /// The disks beneath `/`.
    pub root: Fact<Vec<Disk>>,
    /// The device that the configuration says stands on the volumes, if it says so.
    pub assembled: Fact<Option<Layer>>,
    /// From the mount point down to the keys, as far as it leads now.
    pub chain: Fact<Chain>,
    /// What is remembered of an earlier confirmation.
    pub remembered: Fact<Option<Confirmation>>,
}

/// From a path to the keys: what is mounted there, what that stands on, and what EC2 says of the
/// volumes beneath.
#[derive(Debug, Clone, Serialize)]
pub struct Chain {
    /// What is mounted on the mount point; none while nothing is.
    pub mount: Option<Mount>,
    /// The mounted device, down to its disks.
    pub device: Option<Layer>,
    /// What EC2 says of the volumes beneath.
    pub volumes: Vec<AttachedVolume>,
    /// The same for people, a line for each link.
    pub path: Vec<String>,
}

impl Control for DataVolume {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "data-volume",
        title: "The data volume is attached and encrypted",
        why: "Patient data is kept on an encrypted EBS volume and nowhere else. EC2 alone knows \
              whether a volume is encrypted; the disk's serial number alone tells which disk it is.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let disks = block::disks();
        let attached = match &disks {
            Ok(disks) => cx.aws.attached_volumes(disks).await,
            // Without the disks EC2's answer would be of no use.
            Err(e) => Fact::new("EC2 DescribeVolumes", Err(anyhow::anyhow!("not asked: {e:#}"))),
        };
        let known: &[AttachedVolume] = attached.known().map_or(&[], Vec::as_slice);
        let chain = chain(&cx.config, disks.as_deref().unwrap_or_default(), known);
        Facts {
            identity: cx.aws.identity_fact().await,
            boot_id: Fact::new("/proc/sys/kernel/random/boot_id", identity::boot_id()),
            disks: Fact::new("/sys/block", disks),
            root: Fact::new("/sys/dev/block", chain::disks_beneath(Path::new("/"))),
            assembled: Fact::new("/sys/dev/block", volume::assembled(&cx.config)),
            chain: Fact::new("/proc/self/mountinfo, /sys/dev/block, EC2 DescribeVolumes", chain),
            remembered: Fact::new(cache::PATH, cache::read()),
            attached,
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        Ok(match state(config, facts)? {
            State::Missing(misfit) | State::Unfit(misfit) => {
                Verdict::fail(misfit.expected, misfit.observed, misfit.remedy)
            }
            State::Fit(Fit { device, volumes }) => {
                let keys: Vec<&str> = volumes
                    .iter()
                    .map(|v| v.kms_key_id.as_deref().unwrap_or("an unnamed key"))
                    .collect();
                Verdict::pass(format!(
                    "{} ({}, {}) is encrypted with {}",
                    device.volumes,
                    volumes
                        .iter()
                        .map(|v| v.device.as_deref().unwrap_or("unnamed"))
                        .collect::<Vec<_>>()
                        .join(" and "),
                    device.layer.name,
                    keys.join(" and ")
                ))
            }
        })
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        Ok(match state(config, facts)? {
            State::Missing(_) => Plan::Steps(vec![Step::AwaitVolume {
                volume: config.volume.select.to_string(),
                seconds: config.volume.wait_seconds.get(),
            }]),
            State::Unfit(Misfit { observed, .. }) => {
                let why = format!(
                    "{observed}; nothing is written to a volume that is not fit for patient data"
                );
                // What was confirmed under another policy must not keep the gate open.
                match facts.remembered.known() {
                    Ok(None) => Plan::Refuse { why },
                    _ => Plan::Contain { steps: vec![Step::ForgetVolume, Step::StopDocker], why },
                }
            }
            State::Fit(fit) => {
                let confirmation = confirmation(&fit, facts)?;
                // A memory that cannot be read is replaced: EC2 has just said what is true.
                match facts.remembered.known() {
                    Ok(Some(old)) if old.same_as(&confirmation) => Plan::Nothing,
                    _ => Plan::Steps(vec![Step::RememberVolume { confirmation }]),
                }
            }
        })
    }
}

fn state(config: &Config, facts: &Facts) -> Result<State, Unknown> {
    let known = Known {
        attached: facts.attached.known()?,
        disks: facts.disks.known()?,
        root: facts.root.known()?,
        assembled: facts.assembled.known()?.as_ref(),
    };
    volume::state(config, known)
}

/// What is to be remembered of a fit volume.
fn confirmation(fit: &Fit, facts: &Facts) -> Result<Confirmation, Unknown> {
    let disks: Vec<&Disk> = fit.device.layer.ends().into_iter().filter_map(Result::ok).collect();
    // A disk without a serial number is known by its name, and that for one boot.
    let named = |disk: &&&Disk| matches!(disk.told_by, ToldBy::Mapping(_));
    let disk_of = |volume: &AttachedVolume| {
        let is = |disk: &&&Disk| disk.volume_id().as_ref() == Some(&volume.volume_id);
        disks.iter().filter(named).find(is).map(|disk| disk.name.clone())
    };
    let mut volumes: Vec<Confirmed> = fit
        .volumes
        .iter()
        .map(|volume| Confirmed {
            volume_id: volume.volume_id.clone(),
            kms_key_id: volume.kms_key_id.clone(),
            disk: disk_of(volume),
        })
        .collect();
    volumes.sort_by(|a, b| a.volume_id.cmp(&b.volume_id));
    let boot_id = if disks.iter().any(|disk| named(&disk)) {
        Some(facts.boot_id.known()?.clone())
    } else {
        None
    };
    Ok(Confirmation {
        version: cache::VERSION,
        volumes,
        instance_id: facts.identity.known()?.instance_id.clone(),
        boot_id,
        confirmed_at: facts.attached.at,
    })
}

/// Follows the mount point down to the volumes, as far as it leads.
fn chain(config: &Config, disks: &[Disk], attached: &[AttachedVolume]) -> anyhow::Result<Chain> {
    let place = config.volume.mount_point.path();
    let mount = mounts::at(place)?.pop();
    let Some(mount) = mount else {
        let path = vec![format!("{}: nothing is mounted there", place.display())];
        return Ok(Chain { mount: None, device: None, volumes: Vec::new(), path });
    };
    let mut path =
        vec![format!("{}: {} on the device {}", place.display(), mount.fs_type, mount.device)];
    let (mut device, mut volumes) = (None, Vec::new());
    if mount.device.major != 0 {
        let layer = volume::with_volumes(Layer::of(mount.device)?, disks, attached);
        path.extend(layer.lines().into_iter().map(|line| format!("  {line}")));
        let ids: Vec<_> =
            layer.ends().into_iter().filter_map(|end| end.ok()?.volume_id()).collect();
        volumes = attached.iter().filter(|v| ids.contains(&v.volume_id)).cloned().collect();
        path.extend(volumes.iter().map(describe));
        device = Some(layer);
    }
    Ok(Chain { mount: Some(mount), device, volumes, path })
}

/// What EC2 says of a volume, in one line.
fn describe(volume: &AttachedVolume) -> String {
    format!(
        "{}: {} as {}, {}",
        volume.volume_id,
        volume.attachment.as_deref().unwrap_or("in an unknown state"),
        volume.device.as_deref().unwrap_or("an unknown name"),
        match (volume.encrypted, &volume.kms_key_id) {
            (Some(true), Some(key)) => format!("encrypted with {key}"),
            (Some(true), None) => "encrypted with an unnamed key".to_owned(),
            (Some(false), _) => "not encrypted".to_owned(),
            (None, _) => "encryption unknown".to_owned(),
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::{DevNum, VolumeId};
    use anyhow::anyhow;

    const ID: &str = "vol-0123456789abcdef0";
    const KEY: &str = "arn:aws:kms:us-east-1:111122223333:key/1";

    fn volume() -> AttachedVolume {
        AttachedVolume {
            volume_id: VolumeId::parse(ID).unwrap(),
            device: Some("/dev/sdf".into()),
            attachment: Some("attached".into()),
            encrypted: Some(true),
            kms_key_id: Some(KEY.into()),
            attachments: 1,
            size_gib: Some(8),
            tags: [].into(),
        }
    }

    fn disk() -> Disk {
        Disk {
            name: "nvme1n1".into(),
            number: DevNum { major: 259, minor: 1 },
            serial: Some("vol0123456789abcdef0".into()),
            model: Some("Amazon Elastic Block Store".into()),
            size: 8 << 30,
            told_by: ToldBy::Serial,
            sequence: None,
        }
    }

    fn facts(attached: Vec<AttachedVolume>, disks: Vec<Disk>) -> Facts {
        let identity = Identity {
            instance_id: "i-0123456789abcdef0".into(),
            region: "us-east-1".into(),
            account_id: "111122223333".into(),
            availability_zone: "us-east-1a".into(),
            instance_type: "m5.large".into(),
            image_id: "ami-1".into(),
        };
        Facts {
            identity: Fact::new("t", Ok(identity)),
            boot_id: Fact::new("t", Ok("boot".into())),
            root: Fact::new("t", Ok(vec![])),
            assembled: Fact::new("t", Ok(None)),
            chain: Fact::new("t", Err(anyhow!("not needed"))),
            attached: Fact::new("t", Ok(attached)),
            disks: Fact::new("t", Ok(disks)),
            remembered: Fact::new("t", Ok(None)),
        }
    }

    fn other(change: impl FnOnce(&mut AttachedVolume)) -> AttachedVolume {
        let mut volume = volume();
        change(&mut volume);
        volume
    }

    /// Judges, and gives the verdict's word and whether the plan waits, remembers or refuses.
    fn outcome(config: &Config, facts: &Facts) -> (&'static str, &'static str) {
        let word = DataVolume.judge(config, facts).map_or("unknown", |v| v.word());
        let plan = match DataVolume.plan(config, facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(steps)) => match &steps[..] {
                [Step::AwaitVolume { .. }] => "wait",
                [Step::RememberVolume { .. }] => "remember",
                other => panic!("{other:?}"),
            },
            Ok(Plan::Contain { .. }) => "contain",
            Ok(Plan::Refuse { .. }) | Err(_) => "refuse",
        };
        (word, plan)
    }

    #[test]
    fn only_an_encrypted_attached_volume_with_its_disk_passes() {
        let foreign = Disk { serial: Some("vol0ffffffffffffffff".into()), ..disk() };
        let store = Disk { model: Some("Amazon EC2 NVMe Instance Storage".into()), ..disk() };
        let table = [
            (vec![volume()], vec![disk()], ("pass", "remember")),
            (vec![other(|v| v.device = Some("sdf".into()))], vec![disk()], ("pass", "remember")),
            (vec![], vec![disk()], ("fail", "wait")),
            (vec![other(|v| v.device = Some("/dev/sdg".into()))], vec![disk()], ("fail", "wait")),
            (vec![other(|v| v.device = None)], vec![disk()], ("fail", "wait")),
            (vec![volume()], vec![], ("fail", "wait")),
            (vec![volume()], vec![foreign], ("fail", "wait")),
            (vec![volume()], vec![store], ("fail", "wait")),
            (
                vec![other(|v| v.attachment = Some("attaching".into()))],
                vec![disk()],
                ("fail", "wait"),
            ),
            (vec![other(|v| v.attachment = None)], vec![disk()], ("fail", "wait")),
            (vec![other(|v| v.encrypted = Some(false))], vec![disk()], ("fail", "refuse")),
            (vec![other(|v| v.encrypted = None)], vec![disk()], ("unknown", "refuse")),
            (vec![other(|v| v.attachments = 2)], vec![disk()], ("fail", "refuse")),
            (vec![volume(), volume()], vec![disk()], ("unknown", "refuse")),
            (vec![volume()], vec![disk(), disk()], ("unknown", "refuse")),
        ];
        for (i, (attached, disks, expected)) in table.into_iter().enumerate() {
            let facts = facts(attached, disks);
            assert_eq!(outcome(&Config::default(), &facts), expected, "row {i}");
        }
    }

    #[test]
    fn another_volumes_encryption_counts_for_nothing() {
        let encrypted = other(|v| {
            v.device = Some("/dev/sdg".into());
            v.volume_id = VolumeId::parse("vol-0aaaaaaaaaaaaaaaa").unwrap();
        });
        let facts = facts(vec![encrypted, other(|v| v.encrypted = Some(false))], vec![disk()]);
        assert_eq!(outcome(&Config::default(), &facts), ("fail", "refuse"));
    }

    #[test]
    fn keys_are_checked_when_they_are_configured() {
        let mut config = Config::default();
        config.volume.kms_keys = vec![KEY.into()];
        assert_eq!(outcome(&config, &facts(vec![volume()], vec![disk()])).0, "pass");
        let unnamed = facts(vec![other(|v| v.kms_key_id = None)], vec![disk()]);
        assert_eq!(outcome(&config, &unnamed), ("unknown", "refuse"));
        config.volume.kms_keys = vec!["arn:aws:kms:us-east-1:111122223333:key/2".into()];
        assert_eq!(outcome(&config, &facts(vec![volume()], vec![disk()])), ("fail", "refuse"));
    }

    #[test]
    fn what_cannot_be_asked_is_unknown_and_changes_nothing() {
        let config = Config::default();
        let mut denied = facts(vec![], vec![disk()]);
        denied.attached = Fact::new("t", Err(anyhow!("UnauthorizedOperation")));
        assert_eq!(outcome(&config, &denied), ("unknown", "refuse"));
        let mut blind = facts(vec![volume()], vec![]);
        blind.disks = Fact::new("t", Err(anyhow!("EIO")));
        assert_eq!(outcome(&config, &blind), ("unknown", "refuse"));
    }

    #[test]
    fn the_same_confirmation_is_written_once() {
        let config = Config::default();
        let mut facts = facts(vec![volume()], vec![disk()]);
        let Ok(Plan::Steps(steps)) = DataVolume.plan(&config, &facts) else { panic!() };
        let [Step::RememberVolume { confirmation }] = &steps[..] else { panic!() };
        facts.remembered = Fact::new("t", Ok(Some(confirmation.clone())));
        assert_eq!(outcome(&config, &facts), ("pass", "nothing"));
        let stale =
            Confirmation { instance_id: "i-0fffffffffffffff0".into(), ..confirmation.clone() };
        facts.remembered = Fact::new("t", Ok(Some(stale)));
        assert_eq!(outcome(&config, &facts), ("pass", "remember"));
        // A volume that is not accepted any more is forgotten, and Docker stopped.
        let mut narrow = Config::default();
        narrow.volume.kms_keys = vec!["arn:aws:kms:us-east-1:111122223333:key/2".into()];
        assert_eq!(outcome(&narrow, &facts), ("fail", "contain"));
    }
}
