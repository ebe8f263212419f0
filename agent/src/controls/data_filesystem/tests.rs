//! Tests of when a disk is formatted, and when never.

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
    config.volume.format_unrecognised = ids.iter().map(|id| VolumeId::parse(id).unwrap()).collect();
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
    let used = Facts { users: used, intent: Fact::new("t", Ok(Some(intent()))), ..unfinished() };
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
    let Ok(Plan::Refuse { why }) = DataFilesystem.plan(&Config::default(), &unrecognised()) else {
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
    let intent =
        (volumes, instance, size, filesystem).prop_map(|(volumes, instance, size, filesystem)| {
            Intent {
                uuid: volumes.filesystem_uuid(),
                instance_id: instance.to_owned(),
                volumes,
                size,
                filesystem,
                ..intent()
            }
        });
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
