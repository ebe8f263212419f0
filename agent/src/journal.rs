//! Where messages go: to the journal with structured fields (`HOSTAGENT_CONTROL`,
//! `HOSTAGENT_VERDICT`, …), and, for whoever watches, as plain lines to the terminal or to the
//! machine's console, which EC2 shows as the instance's console output.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::sync::Mutex;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// Sends this program's messages on their way. `lines` is the least grave level that is also shown
/// as lines.
pub fn init(lines: Level) {
    // Only our own: the SDK logs requests, and with them what must not be in a log.
    let own = || EnvFilter::new("hostagent=info");
    // A machine without a journal has its lines on standard error, and no less.
    let journal = tracing_journald::layer()
        .ok()
        .map(|layer| layer.with_field_prefix(Some("HOSTAGENT".into())));
    let lines = if journal.is_some() { LevelFilter::from_level(lines) } else { LevelFilter::INFO };
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).event_format(Line);
    let layer = match console() {
        Some(console) => layer.with_writer(Mutex::new(console)).with_filter(lines).boxed(),
        None => layer.with_writer(io::stderr).with_filter(lines).boxed(),
    };
    tracing_subscriber::registry()
        .with(journal.map(|journal| journal.with_filter(own())))
        .with(layer.with_filter(own()))
        .init();
}

/// The machine's console, if this process's standard error is the journal: the journal has every
/// message already, with its fields.
fn console() -> Option<File> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let stderr = std::fs::metadata("/proc/self/fd/2").ok()?;
    if stream != format!("{}:{}", stderr.dev(), stderr.ino()) {
        return None;
    }
    // Not as a controlling terminal, and never waiting for a console that does not take it.
    let flags = nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK;
    let open = |path| OpenOptions::new().write(true).custom_flags(flags).open(path);
    open("/dev/console").or_else(|_| open("/dev/null")).ok()
}

/// `hostagent: CONTROL: message`
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(writer, "hostagent: ")?;
        if let Some(control) = fields.control {
            write!(writer, "{control}: ")?;
        }
        writeln!(writer, "{}", fields.message)
    }
}

#[derive(Default)]
struct Fields {
    control: Option<String>,
    message: String,
}

impl tracing::field::Visit for Fields {
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        match field.name() {
            "control" => self.control = Some(value.to_owned()),
            "message" => value.clone_into(&mut self.message),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}
