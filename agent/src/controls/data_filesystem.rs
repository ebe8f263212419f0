//! `data-filesystem`: the data volume carries hostagent's own filesystem, and exactly that.
//!
//! This control decides whether a disk is formatted. It plans that for the disk of the confirmed
//! volume only, used by nobody and read without error, in three cases: it is blank; it holds exactly
//! what an interrupted format of this instance has written; or it holds what nothing recognises, and
//! the configuration names the volume. Whatever else is on the disk is somebody's.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::data_volume;
use crate::config::{Config, Filesystem};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, Disk, VolumeId};
use crate::host::content::{self, Content, Inspection};
use crate::host::format::{self, Intent, Onto};
use crate::step::Step;

/// See the module.
pub struct DataFilesystem;

/// How long looking at the disk may take: while somebody waits for a report, and in a run, when the
/// first read of a volume that was made from a snapshot is given time. Below the engine's limits.
const BRIEF: Duration = Duration::from_secs(45);
const LONG: Duration = Duration::from_secs(300);

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which instance this is.
    pub instance_id: Fact<String>,
    /// The data volume's disk.
    pub disk: Fact<Disk>,
    /// Who uses it.
    pub users: Fact<Vec<String>>,
    /// What is on it.
    pub content: Fact<Inspection>,
    /// What was about to be written to the volume when a format was interrupted, its image whole.
    pub intent: Fact<Option<Intent>>,
    /// Whether anything is kept of a format of the volume.
    pub remains: Fact<bool>,
    /// Whether the program that makes the filesystem is installed.
    pub tool: Fact<bool>,
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
        let filesystem = cx.config.volume.filesystem;
        let limit = if cx.deadline.is_some() { LONG } else { BRIEF };
        let instance_id = cx.aws.identity().await.map(|identity| identity.instance_id.clone());
        let disk = data_volume::fit_disk(cx).await;
        let volume = disk.as_ref().ok().and_then(Disk::volume_id);
        let mut intent = volume.as_ref().map_or_else(no_disk, format::intent);
        let (users, mut content) = match &disk {
            Ok(disk) => (block::users(disk), content::inspect(disk, None, limit).await),
            Err(_) => (no_disk(), no_disk()),
        };
        // Only what nothing recognises can be an interrupted format of ours: it is compared with
        // what was about to be written.
        if let (Ok(seen), Ok(disk), Ok(Some(begun)), Ok(instance_id)) =
            (&content, &disk, &intent, &instance_id)
            && matches!(seen.content, Content::Unrecognised { .. })
            && begun.is_for(instance_id, disk, filesystem)
        {
            match format::image_of(begun).await {
                Ok(image) => content = content::inspect(disk, Some(image), limit).await,
                Err(e) => intent = Err(e),
            }
        }
        Facts {
            instance_id: Fact::new("instance metadata", instance_id),
            disk: Fact::new("/sys/block", disk),
            users: Fact::new("/sys/block, /proc/self/mountinfo, /proc/swaps", users),
            content: Fact::new("the disk itself, and blkid -p", content),
            intent: Fact::new(format::DIR, intent),
            remains: Fact::new(format::DIR, volume.as_ref().map_or_else(no_disk, format::remains)),
            tool: Fact::new(format::tool(filesystem).0, format::installed(filesystem)),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let disk = facts.disk.known()?;
        let id = disk.volume_id().ok_or_else(|| Unknown("the disk has no volume id".into()))?;
        let kind = config.volume.filesystem.as_str();
        let seen = facts.content.known()?;
        if is_ours(&seen.content, kind, &id) {
            if seen.entry_types != Some(true) {
                return Ok(Verdict::fail(
                    format!("{kind} that keeps the types of directory entries"),
                    format!("{kind} on {id} does not keep them (ftype=0), and overlay2 needs them"),
                    "attach a new, empty volume and copy the data",
                ));
            }
            return Ok(Verdict::pass(format!("{kind} {} on {id}", id.filesystem_uuid())));
        }
        let provision = || "run `hostagent provision`".to_owned();
        let keep = || {
            format!(
                "if the data on {id} is not needed, attach a new, empty volume instead; hostagent \
                 never formats what is recognised"
            )
        };
        Ok(Verdict::fail(
            format!("{kind} with the UUID {}, which hostagent gives to {id}", id.filesystem_uuid()),
            describe(&seen.content, &id),
            match &seen.content {
                Content::Blank { .. } | Content::Unfinished { .. } => provision(),
                Content::Unrecognised { .. } if is_named(config, &id) => provision(),
                Content::Unrecognised { .. } => name_it(&id),
                Content::Contradiction { .. } | Content::Signature { .. } => keep(),
            },
        ))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let disk = facts.disk.known()?;
        let id = disk.volume_id().ok_or_else(|| Unknown("the disk has no volume id".into()))?;
        let filesystem = config.volume.filesystem;
        let content = &facts.content.known()?.content;
        if is_ours(content, filesystem.as_str(), &id) {
            // The filesystem is complete: its last sector was written last.
            return Ok(match facts.remains.known() {
                Ok(true) => Plan::Steps(vec![Step::ForgetFormat { volume_id: id }]),
                _ => Plan::Nothing,
            });
        }
        let what = describe(content, &id);
        let onto = match content {
            Content::Blank { .. } => Onto::Blank,
            Content::Unfinished { .. } => {
                // The content was compared with the image of this intent; without it, it is nothing.
                let instance_id = facts.instance_id.known()?;
                match facts.intent.known()? {
                    Some(intent) if intent.is_for(instance_id, disk, filesystem) => {
                        Onto::Unfinished
                    }
                    _ => return Ok(Plan::refuse(format!("{what}; what was begun is not known"))),
                }
            }
            Content::Unrecognised { .. } if is_named(config, &id) => {
                if let Some(copy) = facts.content.known()?.remnant_of(id.filesystem_uuid())
                    && !is_begun(facts, disk, filesystem)
                {
                    return Ok(Plan::refuse(format!(
                        "{what}, but it held hostagent's own filesystem: a copy of its superblock is \
                         at byte {}; repair it with fsck, or attach a new, empty volume",
                        copy.at
                    )));
                }
                Onto::Unrecognised
            }
            Content::Unrecognised { .. } => {
                let interrupted = match facts.intent.known() {
                    Err(Unknown(why)) => {
                        format!(
                            " (whether it is a format that was interrupted is not known: {why})"
                        )
                    }
                    Ok(_) => String::new(),
                };
                return Ok(Plan::refuse(format!("{what}{interrupted}; {}", name_it(&id))));
            }
            Content::Contradiction { .. } | Content::Signature { .. } => {
                return Ok(Plan::refuse(format!("{what}; it is not formatted")));
            }
        };
        let users = facts.users.known()?;
        if !users.is_empty() {
            return Ok(Plan::refuse(format!("{id} is in use: {}", users.join(", "))));
        }
        if !*facts.tool.known()? {
            let (program, package) = format::tool(filesystem);
            return Ok(Plan::refuse(format!(
                "{program} is not there; install the package {package} (apt-get install {package})"
            )));
        }
        Ok(Plan::Steps(vec![Step::FormatVolume {
            uuid: id.filesystem_uuid(),
            filesystem,
            volume_id: id,
            onto,
        }]))
    }
}

/// Whether a format of this disk was begun and never completed.
fn is_begun(facts: &Facts, disk: &Disk, filesystem: Filesystem) -> bool {
    match (facts.intent.known(), facts.instance_id.known()) {
        (Ok(Some(intent)), Ok(instance_id)) => intent.is_for(instance_id, disk, filesystem),
        _ => false,
    }
}

/// Whether the configuration allows unrecognised content of this volume to be destroyed.
fn is_named(config: &Config, id: &VolumeId) -> bool {
    config.volume.format_unrecognised.contains(id)
}

fn name_it(id: &VolumeId) -> String {
    format!(
        "it is not formatted unless you name it: volume.format_unrecognised = [\"{id}\"] lets \
         hostagent destroy what is there"
    )
}

fn no_disk<T>() -> Result<T> {
    Err(anyhow::anyhow!("the data volume's disk is not known"))
}

fn is_ours(content: &Content, kind: &str, id: &VolumeId) -> bool {
    matches!(content, Content::Signature { name, uuid: Some(uuid), .. }
        if name == kind && *uuid == id.filesystem_uuid().to_string())
}

fn describe(content: &Content, id: &VolumeId) -> String {
    match content {
        Content::Blank { read } => format!("{id} is blank ({} MiB read)", read >> 20),
        Content::Unfinished { written } => {
            format!(
                "{id} holds a format of hostagent's that was interrupted ({} KiB)",
                written >> 10
            )
        }
        Content::Contradiction { blkid, own } => {
            format!("on {id} blkid finds {blkid}, but hostagent's own probe {own}")
        }
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

    const INSTANCE: &str = "i-0123456789abcdef0";

    fn disk(serial: Option<&str>) -> Disk {
        Disk {
            name: "nvme1n1".into(),
            number: DevNum { major: 259, minor: 1 },
            serial: serial.map(str::to_owned),
            model: None,
            size: 8 << 30,
        }
    }

    fn inspection(content: Content) -> Inspection {
        Inspection {
            content,
            blkid: None,
            own: Vec::new(),
            regions: 1,
            bytes: 1,
            milliseconds: 1,
            copy: None,
            entry_types: Some(true),
        }
    }

    fn facts(content: Result<Content>, users: Result<Vec<String>>) -> Facts {
        Facts {
            instance_id: Fact::new("t", Ok(INSTANCE.into())),
            disk: Fact::new("t", Ok(disk(Some("vol0123456789abcdef0")))),
            users: Fact::new("t", users),
            content: Fact::new("t", content.map(inspection)),
            intent: Fact::new("t", Ok(None)),
            remains: Fact::new("t", Ok(false)),
            tool: Fact::new("t", Ok(true)),
        }
    }

    fn signature(name: &str, uuid: Option<&str>) -> Content {
        Content::Signature { name: name.into(), uuid: uuid.map(str::to_owned), label: None }
    }

    fn id() -> VolumeId {
        disk(Some("vol0123456789abcdef0")).volume_id().unwrap()
    }

    fn ours() -> String {
        id().filesystem_uuid().to_string()
    }

    fn intent() -> Intent {
        Intent {
            version: 1,
            instance_id: INSTANCE.into(),
            volume_id: id(),
            filesystem: Filesystem::Ext4,
            uuid: id().filesystem_uuid(),
            size: 8 << 30,
            checksum: "x".into(),
        }
    }

    fn naming(ids: &[&str]) -> Config {
        let mut config = Config::default();
        config.volume.format_unrecognised =
            ids.iter().map(|id| VolumeId::parse(id).unwrap()).collect();
        config
    }

    fn plan(config: &Config, facts: &Facts) -> &'static str {
        match DataFilesystem.plan(config, facts) {
            Ok(Plan::Nothing) => "nothing",
            Ok(Plan::Steps(steps)) => match &steps[..] {
                [Step::FormatVolume { onto: Onto::Blank, .. }] => "format",
                [Step::FormatVolume { onto: Onto::Unfinished, .. }] => "resume",
                [Step::FormatVolume { onto: Onto::Unrecognised, .. }] => "destroy",
                [Step::ForgetFormat { .. }] => "forget",
                other => panic!("{other:?}"),
            },
            Ok(Plan::Refuse { .. } | Plan::Contain { .. }) | Err(_) => "refuse",
        }
    }

    #[test]
    fn ours_is_reused_blank_is_formatted_everything_else_is_refused() {
        let config = Config::default();
        let ours = ours();
        let blank = || Content::Blank { read: 1 };
        let foreign = "0c1f6c11-0000-4000-8000-000000000000";
        let contradiction = Content::Contradiction { blkid: "nothing".into(), own: "ext4".into() };
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
            (Ok(signature("ext4", Some(foreign))), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("ext4", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("xfs", Some(&ours))), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("crypto_LUKS", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(signature("gpt", None)), Ok(vec![]), "fail", "refuse"),
            (Ok(contradiction), Ok(vec![]), "fail", "refuse"),
            (Ok(Content::Unrecognised { offset: 4096 }), Ok(vec![]), "fail", "refuse"),
            // Without the intent that it was compared with, it is nothing of ours.
            (Ok(Content::Unfinished { written: 4096 }), Ok(vec![]), "fail", "refuse"),
            (Err(anyhow!("EIO")), Ok(vec![]), "unknown", "refuse"),
        ];
        for (i, (content, users, word, planned)) in table.into_iter().enumerate() {
            let facts = facts(content, users);
            let verdict = DataFilesystem.judge(&config, &facts).map_or("unknown", |v| v.word());
            assert_eq!((verdict, plan(&config, &facts)), (word, planned), "row {i}");
        }
    }

    #[test]
    fn a_missing_program_is_named_before_anything_is_done() {
        let mut config = Config::default();
        config.volume.filesystem = Filesystem::Xfs;
        let mut facts = facts(Ok(Content::Blank { read: 1 }), Ok(vec![]));
        assert_eq!(plan(&config, &facts), "format");
        facts.tool = Fact::new("t", Ok(false));
        let Ok(Plan::Refuse { why }) = DataFilesystem.plan(&config, &facts) else { panic!() };
        assert!(why.contains("apt-get install xfsprogs"), "{why}");
        facts.tool = Fact::new("t", Err(anyhow!("EACCES")));
        assert_eq!(plan(&config, &facts), "refuse");
    }

    #[test]
    fn xfs_of_ours_without_ftype_fails() {
        let mut config = Config::default();
        config.volume.filesystem = Filesystem::Xfs;
        let mut facts = facts(Ok(signature("xfs", Some(&ours()))), Ok(vec![]));
        assert_eq!(DataFilesystem.judge(&config, &facts).unwrap().word(), "pass");
        for entry_types in [Some(false), None] {
            let content = signature("xfs", Some(&ours()));
            let seen = Inspection { entry_types, ..inspection(content) };
            facts.content = Fact::new("t", Ok(seen));
            assert_eq!(DataFilesystem.judge(&config, &facts).unwrap().word(), "fail");
            assert_eq!(plan(&config, &facts), "nothing");
        }
    }

    #[test]
    fn an_interrupted_format_is_finished_only_with_its_own_intent() {
        let config = Config::default();
        let unfinished = || facts(Ok(Content::Unfinished { written: 4096 }), Ok(vec![]));
        let with = |intent: Result<Option<Intent>>| {
            plan(&config, &Facts { intent: Fact::new("t", intent), ..unfinished() })
        };
        assert_eq!(with(Ok(Some(intent()))), "resume");
        let other: [fn(&mut Intent); 6] = [
            |i| i.version = 2,
            |i| i.instance_id = "i-0fffffffffffffff0".into(),
            |i| i.volume_id = VolumeId::parse("vol-0fffffffffffffff0").unwrap(),
            |i| i.filesystem = Filesystem::Xfs,
            |i| i.uuid = uuid::Uuid::nil(),
            |i| i.size += 4096,
        ];
        for (i, change) in other.into_iter().enumerate() {
            let mut intent = intent();
            change(&mut intent);
            assert_eq!(with(Ok(Some(intent))), "refuse", "case {i}");
        }
        assert_eq!(with(Ok(None)), "refuse");
        assert_eq!(with(Err(anyhow!("damaged"))), "refuse");
        let used = Fact::new("t", Ok(vec!["held by dm-0".to_owned()]));
        let used =
            Facts { users: used, intent: Fact::new("t", Ok(Some(intent()))), ..unfinished() };
        assert_eq!(plan(&config, &used), "refuse");
        // An intent alone widens nothing.
        for content in [signature("gpt", None), Content::Unrecognised { offset: 1 }] {
            let facts = facts(Ok(content), Ok(vec![]));
            let facts = Facts { intent: Fact::new("t", Ok(Some(intent()))), ..facts };
            assert_eq!(plan(&config, &facts), "refuse");
        }
    }

    #[test]
    fn what_is_kept_of_a_finished_format_is_removed() {
        let config = Config::default();
        let done = || facts(Ok(signature("ext4", Some(&ours()))), Ok(vec![]));
        let left = Facts { remains: Fact::new("t", Ok(true)), ..done() };
        assert_eq!(plan(&config, &left), "forget");
        let damaged = Facts { intent: Fact::new("t", Err(anyhow!("damaged"))), ..left };
        assert_eq!(plan(&config, &damaged), "forget");
        assert_eq!(plan(&config, &done()), "nothing");
    }

    #[test]
    fn only_the_named_volume_and_only_what_nothing_recognises_is_destroyed() {
        let unrecognised = || facts(Ok(Content::Unrecognised { offset: 4096 }), Ok(vec![]));
        let Ok(Plan::Refuse { why }) = DataFilesystem.plan(&Config::default(), &unrecognised())
        else {
            panic!()
        };
        let wanted = "volume.format_unrecognised = [\"vol-0123456789abcdef0\"]";
        assert!(why.contains(wanted), "{why}");
        let named = naming(&["vol-0fffffffffffffff0", "vol-0123456789abcdef0"]);
        assert_eq!(plan(&named, &unrecognised()), "destroy");
        assert_eq!(plan(&naming(&["vol-0fffffffffffffff0"]), &unrecognised()), "refuse");
        let used = Fact::new("t", Ok(vec!["held by dm-0".to_owned()]));
        assert_eq!(plan(&named, &Facts { users: used, ..unrecognised() }), "refuse");
        let contradiction = Content::Contradiction { blkid: "nothing".into(), own: "gpt".into() };
        for content in [signature("gpt", None), signature("ext4", None), contradiction] {
            assert_eq!(plan(&named, &facts(Ok(content), Ok(vec![]))), "refuse");
        }
    }

    #[test]
    fn what_is_left_of_our_own_filesystem_is_not_destroyed_though_named() {
        let named = naming(&["vol-0123456789abcdef0"]);
        let copy = |uuid: String| {
            let found = content::Found { name: "ext4".into(), at: 1 << 27, uuid: Some(uuid) };
            let content = Content::Unrecognised { offset: 4096 };
            let seen = Inspection { copy: Some(found), ..inspection(content.clone()) };
            Facts { content: Fact::new("t", Ok(seen)), ..facts(Ok(content), Ok(vec![])) }
        };
        assert_eq!(plan(&named, &copy(ours())), "refuse");
        assert_eq!(plan(&named, &copy("someone's".into())), "destroy");
        // Begun over what nothing recognised, and never completed.
        let begun = Fact::new("t", Ok(Some(intent())));
        assert_eq!(plan(&named, &Facts { intent: begun, ..copy(ours()) }), "destroy");
    }

    fn result<T: Clone + std::fmt::Debug>(
        value: impl Strategy<Value = T>,
    ) -> impl Strategy<Value = Result<T, String>> {
        prop_oneof![3 => value.prop_map(Ok), 1 => Just(Err("EIO".to_owned()))]
    }

    fn any_content() -> impl Strategy<Value = Content> {
        let uuid = proptest::option::of(prop_oneof![Just(ours()), Just("x".to_owned())]);
        prop_oneof![
            (0_u64..9).prop_map(|read| Content::Blank { read }),
            (0_u64..9).prop_map(|written| Content::Unfinished { written }),
            (0_u64..9).prop_map(|offset| Content::Unrecognised { offset }),
            Just(Content::Contradiction { blkid: "nothing".into(), own: "gpt".into() }),
            ("ext4|xfs|gpt|swap", uuid).prop_map(|(name, uuid)| signature(&name, uuid.as_deref())),
        ]
    }

    fn any_intent() -> impl Strategy<Value = Option<Intent>> {
        let volume =
            prop_oneof![Just(id()), Just(VolumeId::parse("vol-0fffffffffffffff0").unwrap())];
        let instance = prop_oneof![3 => Just(INSTANCE), 1 => Just("i-0fffffffffffffff0")];
        let size = prop_oneof![3 => Just(8_u64 << 30), 1 => Just(9_u64 << 30)];
        let filesystem = prop_oneof![3 => Just(Filesystem::Ext4), 1 => Just(Filesystem::Xfs)];
        let intent = (volume, instance, size, filesystem).prop_map(
            |(volume_id, instance, size, filesystem)| Intent {
                uuid: volume_id.filesystem_uuid(),
                instance_id: instance.to_owned(),
                volume_id,
                size,
                filesystem,
                ..intent()
            },
        );
        proptest::option::of(intent)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// Over every combination of facts: no plan formats unless identity and disuse are known,
        /// and blankness, or the exact unfinished image of ours, or the operator's word for what
        /// nothing recognises; and the step names the volume whose serial was seen.
        #[test]
        fn nothing_is_formatted_unless_all_is_proven(
            serial in prop_oneof![
                1 => Just(None),
                3 => Just(Some("vol0123456789abcdef0")),
                1 => Just(Some("AWS123")),
            ],
            known_disk in prop::bool::weighted(0.8),
            users in result(prop_oneof![
                2 => Just(Vec::new()),
                1 => prop::collection::vec("[a-z ]{1,8}", 0..3),
            ]),
            content in result(any_content()),
            instance in result(Just(INSTANCE.to_owned())),
            intent in result(any_intent()),
            remains in result(any::<bool>()),
            tool in result(prop::bool::weighted(0.8)),
            named in prop_oneof![
                Just(naming(&[])),
                Just(naming(&["vol-0fffffffffffffff0"])),
                Just(naming(&["vol-0123456789abcdef0"])),
            ],
        ) {
            let seen = disk(serial);
            let onto = match &content {
                Ok(Content::Blank { .. }) => Some(Onto::Blank),
                Ok(Content::Unfinished { .. }) => match (&intent, &instance) {
                    (Ok(Some(i)), Ok(_)) if i.instance_id == INSTANCE
                        && Some(&i.volume_id) == seen.volume_id().as_ref()
                        && i.size == seen.size
                        && i.filesystem == Filesystem::Ext4 => Some(Onto::Unfinished),
                    _ => None,
                },
                Ok(Content::Unrecognised { .. }) => seen
                    .volume_id()
                    .filter(|id| named.volume.format_unrecognised.contains(id))
                    .map(|_| Onto::Unrecognised),
                _ => None,
            };
            let proven = onto.is_some()
                && known_disk
                && seen.volume_id().is_some()
                && matches!(&users, Ok(users) if users.is_empty())
                && matches!(tool, Ok(true));
            let error = |e: String| anyhow!(e);
            let facts = Facts {
                instance_id: Fact::new("t", instance.map_err(error)),
                disk: Fact::new("t", if known_disk { Ok(disk(serial)) } else { Err(anyhow!("none")) }),
                users: Fact::new("t", users.map_err(error)),
                content: Fact::new("t", content.map(inspection).map_err(error)),
                intent: Fact::new("t", intent.map_err(error)),
                remains: Fact::new("t", remains.map_err(error)),
                tool: Fact::new("t", tool.map_err(error)),
            };
            match DataFilesystem.plan(&named, &facts) {
                Ok(Plan::Steps(steps)) => match &steps[..] {
                    [Step::ForgetFormat { .. }] => prop_assert!(!proven),
                    [Step::FormatVolume { volume_id, uuid, onto: over, .. }] => {
                        prop_assert!(proven);
                        prop_assert_eq!(Some(*over), onto);
                        prop_assert_eq!(Some(volume_id.clone()), disk(serial).volume_id());
                        prop_assert_eq!(*uuid, volume_id.filesystem_uuid());
                    }
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                },
                _ => prop_assert!(!proven),
            }
        }
    }
}
