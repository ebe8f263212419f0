//! How far a long piece of work is, for whoever watches it, and how it is told to stop.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

/// Shared by a thread that works and a task that watches.
#[derive(Debug)]
pub struct Progress {
    stage: Mutex<String>,
    done: AtomicU64,
    total: AtomicU64,
    moves: AtomicU64,
    /// The last move that is wanted.
    last: AtomicU64,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            stage: Mutex::default(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            moves: AtomicU64::new(0),
            last: AtomicU64::new(u64::MAX),
        }
    }
}

impl Progress {
    /// Begins a stage of this many bytes; 0 if that is not known.
    pub fn begin(&self, stage: &str, total: u64) -> Result<()> {
        stage.clone_into(&mut self.stage.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.tick()
    }

    /// Something moved. Fails when nobody wants the work any more.
    pub fn tick(&self) -> Result<()> {
        let before = self.moves.fetch_add(1, Ordering::Relaxed);
        ensure!(before < self.last.load(Ordering::Relaxed), "it was given up meanwhile");
        Ok(())
    }

    /// So many more bytes are done.
    pub fn add(&self, bytes: usize) -> Result<()> {
        self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        self.tick()
    }

    /// Makes the work end at its next move.
    pub fn cancel(&self) {
        self.cancel_after(0);
    }

    /// Makes the work end when it has made so many moves.
    pub fn cancel_after(&self, moves: u64) {
        self.last.store(moves, Ordering::Relaxed);
    }

    /// A number that changes as long as the work goes on.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    /// How far it is, in a few words.
    #[must_use]
    pub fn text(&self) -> String {
        let stage = self.stage.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let done = self.done.load(Ordering::Relaxed);
        match self.total.load(Ordering::Relaxed) {
            0 => stage,
            // Holes and blocks are counted a little differently before and after.
            total => format!("{stage}: {} of {}", human(done.min(total)), human(total)),
        }
    }
}

/// A number of bytes for people.
#[must_use]
pub fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(3 << 40), "3.0 TiB");
    }

    #[test]
    fn cancelled_work_ends_at_its_next_move() {
        let progress = Progress::default();
        progress.begin("copying", 10).unwrap();
        progress.add(4).unwrap();
        assert_eq!(progress.text(), "copying: 4 B of 10 B");
        progress.cancel();
        assert!(progress.tick().is_err());
    }
}
