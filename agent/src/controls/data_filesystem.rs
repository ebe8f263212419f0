//! `data-filesystem`: the data volume carries hostagent's own filesystem, and exactly that.
//!
//! This control decides whether a disk is formatted. It plans that for one case only: the disk of
//! the confirmed volume, used by nobody, read without error, and blank. Whatever else is on the disk
//! is somebody's.

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, Content, Disk};
use crate::step::Step;
use crate::volume;

/// See the module.
pub struct DataFilesystem;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The data volume's disk.
    pub disk: Fact<Disk>,
    /// Who uses it.
    pub users: Fact<Vec<String>>,
    /// What is on it.
    pub content: Fact<Content>,
}

impl Control for DataFilesystem {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "data-filesystem",
        title: "The data volume carries hostagent's filesystem",
        why: "A volume is formatted only when it is proven blank, and used only when its filesystem \
              is the one that hostagent made on this very volume. Anything else may be data.",
        requires: &["data-volume"],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let disk = volume::find(cx).await.and_then(|device| {
            device.disk().cloned().context("the data volume's device is no disk")
        });
        let (users, content) = match &disk {
            Ok(disk) => (block::users(disk), block::content(disk).await),
            Err(_) => (no_disk(), no_disk()),
        };
        Facts {
            disk: Fact::new("/sys/block", disk),
            users: Fact::new("/sys/block, /proc/self/mountinfo, /proc/swaps", users),
            content: Fact::new("the disk itself, and blkid -p", content),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let disk = facts.disk.known()?;
        let id = disk.volume_id().ok_or_else(|| Unknown("the disk has no volume id".into()))?;
        let kind = config.volume.filesystem.as_str();
        let content = facts.content.known()?;
        if is_ours(content, kind, &id) {
            return Ok(Verdict::pass(format!("{kind} {} on {id}", id.filesystem_uuid())));
        }
        let keep = format!(
            "if the data on {id} is not needed, attach a new, empty volume instead; hostagent never \
             formats what is not blank"
        );
        Ok(Verdict::fail(
            format!("{kind} with the UUID {}, which hostagent gives to {id}", id.filesystem_uuid()),
            describe(content, &id),
            match content {
                Content::Blank { .. } => "run `hostagent provision`".to_owned(),
                _ => keep,
            },
        ))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let disk = facts.disk.known()?;
        let id = disk.volume_id().ok_or_else(|| Unknown("the disk has no volume id".into()))?;
        let content = facts.content.known()?;
        if is_ours(content, config.volume.filesystem.as_str(), &id) {
            return Ok(Plan::Nothing);
        }
        let users = facts.users.known()?;
        Ok(match content {
            Content::Blank { .. } if users.is_empty() => Plan::Steps(vec![Step::FormatVolume {
                uuid: id.filesystem_uuid(),
                filesystem: config.volume.filesystem,
                volume_id: id,
            }]),
            Content::Blank { .. } => Plan::refuse(format!("{id} is in use: {}", users.join(", "))),
            other => Plan::refuse(format!("{}; it is not formatted", describe(other, &id))),
        })
    }
}

fn no_disk<T>() -> Result<T> {
    Err(anyhow::anyhow!("the data volume's disk is not known"))
}

fn is_ours(content: &Content, kind: &str, id: &block::VolumeId) -> bool {
    matches!(content, Content::Signature { name, uuid: Some(uuid), .. }
        if name == kind && *uuid == id.filesystem_uuid().to_string())
}

fn describe(content: &Content, id: &block::VolumeId) -> String {
    match content {
        Content::Blank { read } => format!("{id} is blank ({} MiB read)", read >> 20),
        Content::Unrecognised { offset } => {
            format!("{id} holds data that nothing recognises, at byte {offset}")
        }
        Content::Signature { name, uuid, label } => {
            let detail = |what: &str, value: &Option<String>| {
                value.as_ref().map(|v| format!(", {what} {v}")).unwrap_or_default()
            };
            format!("{id} carries {name}{}{}", detail("UUID", uuid), detail("label", label))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::DevNum;
    use anyhow::anyhow;
    use proptest::prelude::*;

    fn disk(serial: Option<&str>) -> Disk {
        Disk {
            name: "nvme1n1".into(),
            number: DevNum { major: 259, minor: 1 },
            serial: serial.map(str::to_owned),
            model: None,
            size: 8 << 30,
            told_by: block::ToldBy::Serial,
        }
    }

    fn facts(content: Result<Content>, users: Result<Vec<String>>) -> Facts {
        Facts {
            disk: Fact::new("t", Ok(disk(Some("vol0123456789abcdef0")))),
            users: Fact::new("t", users),
            content: Fact::new("t", content),
        }
    }

    fn signature(name: &str, uuid: Option<&str>) -> Content {
        Content::Signature { name: name.into(), uuid: uuid.map(str::to_owned), label: None }
    }

    fn ours() -> String {
        disk(Some("vol0123456789abcdef0")).volume_id().unwrap().filesystem_uuid().to_string()
    }

    #[test]
    fn ours_is_reused_blank_is_formatted_everything_else_is_refused() {
        let config = Config::default();
        let ours = ours();
        let blank = || Content::Blank { read: 1 };
        let table = [
            (Ok(signature("ext4", Some(&ours))), Ok(vec![]), "pass", "nothing"),
            (
                Ok(signature("ext4", Some(&ours))),
                Ok(vec!["mounted on /data".into()]),
                "pass",
                "nothing",
            ),
            (Ok(blank()), Ok(vec![]), "fail", "format"),
            (Ok(blank()), Ok(vec!["partition nvme1n1p1".into()]), "fail", "refuse"),
            (Ok(blank()), Err(anyhow!("EIO")), "fail", "refuse"),
            (
                Ok(signature("ext4", Some("0c1f6c11-0000-4000-8000-000000000000"))),
                Ok(vec![]),
                "fail",
                "refuse",
            ),
            (Ok(signature("ext4", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("xfs", Some(&ours))), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("crypto_LUKS", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("gpt", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(Content::Unrecognised { offset: 4096 }), Ok(vec![]), "fail", "refuse"),
            (Err(anyhow!("EIO")), Ok(vec![]), "unknown", "refuse"),
        ];
        for (i, (content, users, word, planned)) in table.into_iter().enumerate() {
            let facts = facts(content, users);
            let verdict = DataFilesystem.judge(&config, &facts).map_or("unknown", |v| v.word());
            assert_eq!((verdict, plan(&facts)), (word, planned), "row {i}");
        }
    }

    fn plan(facts: &Facts) -> &'static str {
        match DataFilesystem.plan(&Config::default(), facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(_)) => "format",
            Ok(Plan::Refuse { .. } | Plan::Contain { .. }) | Err(_) => "refuse",
        }
    }

    fn result<T: Clone + std::fmt::Debug>(
        value: impl Strategy<Value = T>,
    ) -> impl Strategy<Value = Result<T, String>> {
        prop_oneof![3 => value.prop_map(Ok), 1 => Just(Err("EIO".to_owned()))]
    }

    proptest! {
        /// Over every combination of facts: no plan formats unless identity, blankness and disuse
        /// are all known, and the step names the volume whose serial was seen.
        #[test]
        fn nothing_is_formatted_unless_all_is_proven(
            serial in prop_oneof![
                Just(None),
                Just(Some("vol0123456789abcdef0")),
                Just(Some("AWS123")),
            ],
            known_disk in any::<bool>(),
            users in result(prop::collection::vec("[a-z ]{1,8}", 0..3)),
            content in result(prop_oneof![
                (0_u64..9).prop_map(|read| Content::Blank { read }),
                (0_u64..9).prop_map(|offset| Content::Unrecognised { offset }),
                ("ext4|xfs|gpt|swap", proptest::option::of(prop_oneof![Just(ours()), Just("x".to_owned())]))
                    .prop_map(|(name, uuid)| signature(&name, uuid.as_deref())),
            ]),
        ) {
            let proven = known_disk
                && disk(serial).volume_id().is_some()
                && matches!(content, Ok(Content::Blank { .. }))
                && matches!(&users, Ok(users) if users.is_empty());
            let error = |e: String| anyhow!(e);
            let facts = Facts {
                disk: Fact::new("t", if known_disk { Ok(disk(serial)) } else { Err(anyhow!("none")) }),
                users: Fact::new("t", users.map_err(error)),
                content: Fact::new("t", content.map_err(error)),
            };
            let plan = DataFilesystem.plan(&Config::default(), &facts);
            match plan {
                Ok(Plan::Steps(steps)) => {
                    prop_assert!(proven);
                    let [Step::FormatVolume { volume_id, uuid, .. }] = &steps[..] else {
                        return Err(TestCaseError::fail(format!("{steps:?}")));
                    };
                    prop_assert_eq!(Some(volume_id.clone()), disk(serial).volume_id());
                    prop_assert_eq!(*uuid, volume_id.filesystem_uuid());
                }
                _ => prop_assert!(!proven),
            }
        }
    }
}
