//! `data-filesystem`: the data volume carries hostagent's own filesystem, and exactly that.
//!
//! This control decides whether a disk is formatted. It plans that for the disk of the confirmed
//! volume only, used by nobody and read without error, in three cases: it is blank; it holds exactly
//! what an interrupted format of this instance has written; or it holds what nothing recognises, and
//! the configuration names the volume. Whatever else is on the disk is somebody's.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::config::{Config, Filesystem};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, VolumeId, Volumes};
use crate::host::content::{self, Content, Inspection};
use crate::host::device::DataDevice;
use crate::host::format::{self, Intent, Onto};
use crate::step::Step;
use crate::volume;

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
    /// The data volume's device.
    pub device: Fact<DataDevice>,
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
        let device = volume::find(cx).await;
        let volumes = device.as_ref().ok().map(|device| &device.volumes);
        let mut intent = volumes.map_or_else(no_device, format::intent);
        let (users, mut content) = match &device {
            Ok(device) => {
                (block::users(device.number()), content::inspect(device, None, limit).await)
            }
            Err(_) => (no_device(), no_device()),
        };
        // Only what nothing recognises can be an interrupted format of ours: it is compared with
        // what was about to be written.
        if let (Ok(seen), Ok(device), Ok(Some(begun)), Ok(instance_id)) =
            (&content, &device, &intent, &instance_id)
            && matches!(seen.content, Content::Unrecognised { .. })
            && begun.is_for(instance_id, device, filesystem)
        {
            match format::image_of(begun).await {
                Ok(image) => content = content::inspect(device, Some(image), limit).await,
                Err(e) => intent = Err(e),
            }
        }
        let remains = volumes.map_or_else(no_device, format::remains);
        Facts {
            instance_id: Fact::new("instance metadata", instance_id),
            device: Fact::new("/sys/block", device),
            users: Fact::new("/sys/block, /proc/self/mountinfo, /proc/swaps", users),
            content: Fact::new("the disk itself, and blkid -p", content),
            intent: Fact::new(format::DIR, intent),
            remains: Fact::new(format::DIR, remains),
            tool: Fact::new(format::tool(filesystem).0, format::installed(filesystem)),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let device = facts.device.known()?;
        let id = &device.volumes;
        let kind = config.volume.filesystem.as_str();
        let seen = facts.content.known()?;
        if is_ours(&seen.content, kind, id) {
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
            describe(&seen.content, id),
            match &seen.content {
                Content::Blank { .. } | Content::Unfinished { .. } => provision(),
                Content::Unrecognised { .. } if is_named(config, id) => provision(),
                Content::Unrecognised { .. } => name_it(id),
                Content::Contradiction { .. } | Content::Signature { .. } => keep(),
            },
        ))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let device = facts.device.known()?;
        let id = &device.volumes;
        let filesystem = config.volume.filesystem;
        let content = &facts.content.known()?.content;
        if is_ours(content, filesystem.as_str(), id) {
            // The filesystem is complete: its last sector was written last.
            return Ok(match facts.remains.known() {
                Ok(true) => Plan::Steps(vec![Step::ForgetFormat { volumes: id.clone() }]),
                _ => Plan::Nothing,
            });
        }
        let what = describe(content, id);
        let onto = match content {
            Content::Blank { .. } => Onto::Blank,
            Content::Unfinished { .. } => {
                // The content was compared with the image of this intent; without it, it is nothing.
                let instance_id = facts.instance_id.known()?;
                match facts.intent.known()? {
                    Some(intent) if intent.is_for(instance_id, device, filesystem) => {
                        Onto::Unfinished
                    }
                    _ => return Ok(Plan::refuse(format!("{what}; what was begun is not known"))),
                }
            }
            Content::Unrecognised { .. } if is_named(config, id) => {
                if let Some(copy) = facts.content.known()?.remnant_of(id.filesystem_uuid())
                    && !is_begun(facts, device, filesystem)
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
                return Ok(Plan::refuse(format!("{what}{interrupted}; {}", name_it(id))));
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
            volumes: id.clone(),
            onto,
        }]))
    }
}

/// Whether a format of this disk was begun and never completed.
fn is_begun(facts: &Facts, device: &DataDevice, filesystem: Filesystem) -> bool {
    match (facts.intent.known(), facts.instance_id.known()) {
        (Ok(Some(intent)), Ok(instance_id)) => intent.is_for(instance_id, device, filesystem),
        _ => false,
    }
}

/// Whether the configuration allows unrecognised content of this volume to be destroyed.
fn is_named(config: &Config, id: &Volumes) -> bool {
    id.ids().iter().all(|id| config.volume.format_unrecognised.contains(id))
}

fn name_it(id: &Volumes) -> String {
    format!(
        "it is not formatted unless you name it: volume.format_unrecognised = [\"{}\"] lets \
         hostagent destroy what is there",
        id.ids().iter().map(VolumeId::as_str).collect::<Vec<_>>().join("\", \"")
    )
}

fn no_device<T>() -> Result<T> {
    Err(anyhow::anyhow!("the data volume's device is not known"))
}

fn is_ours(content: &Content, kind: &str, id: &Volumes) -> bool {
    matches!(content, Content::Signature { name, uuid: Some(uuid), .. }
        if name == kind && *uuid == id.filesystem_uuid().to_string())
}

fn describe(content: &Content, id: &Volumes) -> String {
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
    use crate::aws::ec2::AttachedVolume;
    use crate::host::block::DevNum;
    use crate::host::device;
    use crate::volume::{Known, State};
    use anyhow::anyhow;
    use proptest::prelude::*;

    const INSTANCE: &str = "i-0123456789abcdef0";

    const DATA: DevNum = DevNum { major: 259, minor: 1 };

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
            device: Fact::new("t", Ok(device::example(DATA))),
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

    fn id() -> Volumes {
        device::example(DATA).volumes
    }

    fn other() -> Volumes {
        VolumeId::parse("vol-0fffffffffffffff0").unwrap().into()
    }

    fn ours() -> String {
        id().filesystem_uuid().to_string()
    }

    fn intent() -> Intent {
        Intent {
            version: 1,
            instance_id: INSTANCE.into(),
            volumes: id(),
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
            |i| i.volumes = other(),
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
        let volumes = prop_oneof![Just(id()), Just(other())];
        let instance = prop_oneof![3 => Just(INSTANCE), 1 => Just("i-0fffffffffffffff0")];
        let size = prop_oneof![3 => Just(8_u64 << 30), 1 => Just(9_u64 << 30)];
        let filesystem = prop_oneof![3 => Just(Filesystem::Ext4), 1 => Just(Filesystem::Xfs)];
        let intent = (volumes, instance, size, filesystem).prop_map(
            |(volumes, instance, size, filesystem)| Intent {
                uuid: volumes.filesystem_uuid(),
                instance_id: instance.to_owned(),
                volumes,
                size,
                filesystem,
                ..intent()
            },
        );
        proptest::option::of(intent)
    }

    /// What decides which device is the data volume.
    #[derive(Debug, Clone)]
    struct Identity {
        serial: Option<&'static str>,
        model: Option<&'static str>,
        device: Option<&'static str>,
        attachment: Option<&'static str>,
        encrypted: Option<bool>,
        attachments: usize,
        twice: bool,
        is_root: bool,
    }

    fn any_identity() -> impl Strategy<Value = Identity> {
        (
            prop_oneof![
                8 => Just(Some("vol0123456789abcdef0")),
                1 => Just(None),
                1 => Just(Some("vol0fffffffffffffff0")),
                1 => Just(Some("AWS123")),
            ],
            prop_oneof![8 => Just(None), 1 => Just(Some("Amazon EC2 NVMe Instance Storage"))],
            prop_oneof![8 => Just(Some("/dev/sdf")), 1 => Just(Some("/dev/sdg")), 1 => Just(None)],
            prop_oneof![8 => Just(Some("attached")), 1 => Just(Some("attaching")), 1 => Just(None)],
            prop_oneof![8 => Just(Some(true)), 1 => Just(Some(false)), 1 => Just(None)],
            prop_oneof![8 => Just(1_usize), 1 => Just(2)],
            prop::bool::weighted(0.1),
            prop::bool::weighted(0.1),
        )
            .prop_map(
                |(serial, model, device, attachment, encrypted, attachments, twice, is_root)| {
                    Identity {
                        serial,
                        model,
                        device,
                        attachment,
                        encrypted,
                        attachments,
                        twice,
                        is_root,
                    }
                },
            )
    }

    impl Identity {
        /// Whether it is proven which disk the volume is, and that it may hold patient data.
        fn is_proven(&self) -> bool {
            self.serial == Some("vol0123456789abcdef0")
                && self.model.is_none()
                && self.device == Some("/dev/sdf")
                && self.attachment == Some("attached")
                && self.encrypted == Some(true)
                && self.attachments == 1
                && !self.twice
                && !self.is_root
        }

        /// The device that hostagent finds.
        fn device(&self) -> Result<DataDevice> {
            let mut disk = device::example(DATA).disk().cloned().unwrap();
            disk.serial = self.serial.map(str::to_owned);
            disk.model = self.model.map(str::to_owned);
            let volume = AttachedVolume {
                volume_id: VolumeId::parse("vol-0123456789abcdef0").unwrap(),
                device: self.device.map(str::to_owned),
                attachment: self.attachment.map(str::to_owned),
                encrypted: self.encrypted,
                kms_key_id: None,
                attachments: self.attachments,
                size_gib: Some(8),
                tags: [].into(),
            };
            let root: Vec<_> = self.is_root.then(|| disk.clone()).into_iter().collect();
            let disks = vec![disk; 1 + usize::from(self.twice)];
            let known = Known { attached: &[volume], disks: &disks, root: &root, assembled: None };
            match volume::state(&Config::default(), known) {
                Ok(State::Fit(fit)) => Ok(fit.device),
                Ok(State::Unfit(misfit) | State::Missing(misfit)) => Err(anyhow!(misfit.observed)),
                Err(Unknown(why)) => Err(anyhow!(why)),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8192))]

        /// Over every combination of facts: no plan formats unless identity and disuse are known,
        /// and blankness, or the exact unfinished image of ours, or the operator's word for what
        /// nothing recognises; and the step names the volume whose serial was seen.
        #[test]
        fn nothing_is_formatted_unless_all_is_proven(
            identity in any_identity(),
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
            let onto = match &content {
                Ok(Content::Blank { .. }) => Some(Onto::Blank),
                Ok(Content::Unfinished { .. }) => match (&intent, &instance) {
                    (Ok(Some(i)), Ok(_)) if i.instance_id == INSTANCE
                        && i.volumes == id()
                        && i.size == 8 << 30
                        && i.filesystem == Filesystem::Ext4 => Some(Onto::Unfinished),
                    _ => None,
                },
                Ok(Content::Unrecognised { .. }) => named
                    .volume
                    .format_unrecognised
                    .contains(&id().ids()[0])
                    .then_some(Onto::Unrecognised),
                _ => None,
            };
            let proven = onto.is_some()
                && identity.is_proven()
                && matches!(&users, Ok(users) if users.is_empty())
                && matches!(tool, Ok(true));
            let error = |e: String| anyhow!(e);
            let facts = Facts {
                instance_id: Fact::new("t", instance.map_err(error)),
                device: Fact::new("t", identity.device()),
                users: Fact::new("t", users.map_err(error)),
                content: Fact::new("t", content.map(inspection).map_err(error)),
                intent: Fact::new("t", intent.map_err(error)),
                remains: Fact::new("t", remains.map_err(error)),
                tool: Fact::new("t", tool.map_err(error)),
            };
            match DataFilesystem.plan(&named, &facts) {
                Ok(Plan::Steps(steps)) => match &steps[..] {
                    [Step::ForgetFormat { .. }] => prop_assert!(!proven),
                    [Step::FormatVolume { volumes, uuid, onto: over, .. }] => {
                        prop_assert!(proven);
                        prop_assert_eq!(Some(*over), onto);
                        prop_assert_eq!(volumes, &id());
                        prop_assert_eq!(*uuid, id().filesystem_uuid());
                    }
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                },
                _ => prop_assert!(!proven),
            }
        }
    }
}
