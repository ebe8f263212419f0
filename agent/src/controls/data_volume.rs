//! `data-volume`: the configured EBS volume is attached, encrypted with an accepted key, and the
//! kernel has its disk.
//!
//! Which volume is meant is decided by EC2's mapping of the configured device name to a volume id;
//! which disk that is, by the disk's serial number. What is on the disk is not this control's
//! business.

use serde::Serialize;

use crate::aws::cache::{self, Confirmation};
use crate::aws::ec2::AttachedVolume;
use crate::aws::imds::Identity;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, Disk};
use crate::step::Step;

/// See the module.
pub struct DataVolume;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which instance this is.
    pub identity: Fact<Identity>,
    /// The volumes that EC2 has attached to it.
    pub attached: Fact<Vec<AttachedVolume>>,
    /// The kernel's disks.
    pub disks: Fact<Vec<Disk>>,
    /// What is remembered of an earlier confirmation.
    pub remembered: Fact<Option<Confirmation>>,
}

/// What the facts say of the volume.
enum State<'a> {
    /// Nothing is attached under the configured name.
    NotAttached { others: Vec<String> },
    /// EC2 is still at it.
    Attaching { volume: &'a AttachedVolume },
    /// The volume does not meet the requirements.
    Unfit { expected: String, observed: String, remedy: String },
    /// EC2 has it attached, the kernel has no disk.
    NoDisk { volume: &'a AttachedVolume },
    /// All is well.
    Fit { volume: &'a AttachedVolume, disk: &'a Disk },
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
        Facts {
            identity: cx.aws.identity_fact().await,
            attached,
            disks: Fact::new("/sys/block", disks),
            remembered: Fact::new(cache::PATH, cache::read()),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let device = &config.volume.device;
        Ok(match state(config, facts)? {
            State::NotAttached { others } => Verdict::fail(
                format!("an encrypted volume attached as {device}"),
                if others.is_empty() {
                    "EC2 has no volume attached to this instance".to_owned()
                } else {
                    format!("EC2 has no volume attached as {device}, only {}", others.join(", "))
                },
                format!("attach the data volume as {device}, or set volume.device"),
            ),
            State::Attaching { volume } => Verdict::fail(
                format!("an encrypted volume attached as {device}"),
                format!(
                    "{} as {device} is in the state {}",
                    volume.volume_id,
                    volume.attachment.as_deref().unwrap_or("unknown")
                ),
                "wait until EC2 has attached it",
            ),
            State::Unfit { expected, observed, remedy } => {
                Verdict::fail(expected, observed, remedy)
            }
            State::NoDisk { volume } => Verdict::fail(
                format!("a disk with the serial number of {}", volume.volume_id),
                format!(
                    "EC2 says that {} is attached, the kernel has no such disk",
                    volume.volume_id
                ),
                "wait for the kernel to see it; if it never does, detach the volume and attach it again",
            ),
            State::Fit { volume, disk } => Verdict::pass(format!(
                "{} ({device}, {}) is encrypted with {}",
                volume.volume_id,
                disk.name,
                volume.kms_key_id.as_deref().unwrap_or("an unnamed key")
            )),
        })
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        Ok(match state(config, facts)? {
            State::NotAttached { .. } | State::Attaching { .. } | State::NoDisk { .. } => {
                Plan::Steps(vec![Step::AwaitVolume {
                    device: config.volume.device.to_string(),
                    seconds: config.volume.wait_seconds.get(),
                }])
            }
            State::Unfit { observed, .. } => {
                let why = format!(
                    "{observed}; nothing is written to a volume that is not fit for patient data"
                );
                // What was confirmed under another policy must not keep the gate open.
                match facts.remembered.known() {
                    Ok(None) => Plan::Refuse { why },
                    _ => Plan::Contain { steps: vec![Step::ForgetVolume, Step::StopDocker], why },
                }
            }
            State::Fit { volume, .. } => {
                let confirmation = Confirmation {
                    version: cache::VERSION,
                    volume_id: volume.volume_id.clone(),
                    instance_id: facts.identity.known()?.instance_id.clone(),
                    kms_key_id: volume.kms_key_id.clone(),
                    confirmed_at: facts.attached.at,
                };
                // A memory that cannot be read is replaced: EC2 has just said what is true.
                match facts.remembered.known() {
                    Ok(Some(old)) if old.same_as(&confirmation) => Plan::Nothing,
                    _ => Plan::Steps(vec![Step::RememberVolume { confirmation }]),
                }
            }
        })
    }
}

fn state<'a>(config: &Config, facts: &'a Facts) -> Result<State<'a>, Unknown> {
    let device = &config.volume.device;
    let attached = facts.attached.known()?;
    let here: Vec<&AttachedVolume> =
        attached.iter().filter(|v| v.device.as_deref().is_some_and(|d| device.is(d))).collect();
    let volume = match here[..] {
        [] => {
            let name = |v: &AttachedVolume| {
                format!("{} as {}", v.volume_id, v.device.as_deref().unwrap_or("an unknown name"))
            };
            return Ok(State::NotAttached { others: attached.iter().map(name).collect() });
        }
        [volume] => volume,
        _ => return Err(Unknown(format!("EC2 names {} volumes attached as {device}", here.len()))),
    };
    if let Some(unfit) = unfit(config, volume)? {
        return Ok(unfit);
    }
    if volume.attachment.as_deref() != Some("attached") {
        return Ok(State::Attaching { volume });
    }
    let id = &volume.volume_id;
    let disks: Vec<&Disk> =
        facts.disks.known()?.iter().filter(|d| d.volume_id().as_ref() == Some(id)).collect();
    match disks[..] {
        [] => Ok(State::NoDisk { volume }),
        [disk] => Ok(State::Fit { volume, disk }),
        _ => Err(Unknown(format!("{} disks have the serial number of {id}", disks.len()))),
    }
}

/// Whether the volume, attached or not yet, can never be the data volume as it is.
fn unfit<'a>(config: &Config, volume: &AttachedVolume) -> Result<Option<State<'a>>, Unknown> {
    let id = &volume.volume_id;
    let remedy = "attach a volume that is encrypted with an accepted key; a volume's encryption \
                  cannot be changed, but an encrypted copy can be made from a snapshot";
    match volume.encrypted {
        None => return Err(Unknown(format!("EC2 does not say whether {id} is encrypted"))),
        Some(false) => {
            return Ok(Some(State::Unfit {
                expected: "an encrypted volume".into(),
                observed: format!("{id} is not encrypted"),
                remedy: remedy.into(),
            }));
        }
        Some(true) => {}
    }
    if volume.attachments != 1 {
        return Ok(Some(State::Unfit {
            expected: "a volume that is attached to this instance alone".into(),
            observed: format!("{id} is attached to {} instances", volume.attachments),
            remedy: "attach a volume of this instance's own; two hosts destroy one ext4".into(),
        }));
    }
    let accepted = &config.volume.kms_keys;
    if accepted.is_empty() {
        return Ok(None);
    }
    match &volume.kms_key_id {
        None => Err(Unknown(format!("EC2 does not say with which key {id} is encrypted"))),
        Some(key) if accepted.contains(key) => Ok(None),
        Some(key) => Ok(Some(State::Unfit {
            expected: format!("encryption with {}", accepted.join(" or ")),
            observed: format!("{id} is encrypted with {key}"),
            remedy: remedy.into(),
        })),
    }
}

/// The disk of the fit volume, for the controls behind this one. They run only when this control is
/// met; what EC2 said is not asked again, what the kernel has is.
pub(super) async fn fit_disk(cx: &Context) -> anyhow::Result<Disk> {
    let facts = Facts {
        identity: cx.aws.identity_fact().await,
        attached: cx.aws.attached_volumes(&block::disks()?).await,
        disks: Fact::new("/sys/block", block::disks()),
        remembered: Fact::new(cache::PATH, Ok(None)),
    };
    match state(&cx.config, &facts) {
        Ok(State::Fit { disk, .. }) => Ok(disk.clone()),
        Ok(_) => Err(anyhow::anyhow!("the data volume is not fit")),
        Err(Unknown(why)) => Err(anyhow::anyhow!(why)),
    }
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
        }
    }

    fn disk() -> Disk {
        Disk {
            name: "nvme1n1".into(),
            number: DevNum { major: 259, minor: 1 },
            serial: Some("vol0123456789abcdef0".into()),
            model: Some("Amazon Elastic Block Store".into()),
            size: 8 << 30,
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
