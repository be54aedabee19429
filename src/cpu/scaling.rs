//! What the cutting of a step into tasks allows on many threads, by a model.
//!
//! A step runs on one thread while every parallel loop notes when it and its tasks begin and end, by the thread's own clock, which
//! stands still while other programs use the core. The model deals the tasks of a
//! loop out to `p` threads, in order, each to the thread that is free first; what lies between loops is one thread's. It knows
//! nothing of caches, of memory bandwidth or of what it costs to wake a thread: its efficiencies are what the partition of the
//! work allows, not what a machine reaches.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::Location;

use crate::device::thread_seconds;

/// A place in the source.
pub(crate) type Place = &'static Location<'static>;

/// What a recorded thread does, and when.
#[derive(Clone, Copy, Debug)]
enum Event {
    BeginsLoop(Place),
    BeginsTask,
    Ends,
}

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static EVENTS: RefCell<Vec<(Event, f64)>> = const { RefCell::new(Vec::new()) };
}

/// Whether this thread records its loops. Tasks of a recorded loop run on the thread that runs the loop, the only one of its pool.
pub(super) fn is_on() -> bool {
    ON.get()
}

fn note(event: Event) {
    EVENTS.with_borrow_mut(|events| events.push((event, thread_seconds())));
}

/// Runs a loop; notes when it begins and ends if this thread records.
pub(super) fn recorded_loop(place: Place, f: impl FnOnce()) {
    if !is_on() {
        return f();
    }
    note(Event::BeginsLoop(place));
    f();
    note(Event::Ends);
}

/// Runs a task of a recorded loop, and notes when it begins and ends.
pub(super) fn recorded_task(f: impl FnOnce()) {
    note(Event::BeginsTask);
    f();
    note(Event::Ends);
}

/// Begins to record the loops of this thread, the only one of its pool.
pub(crate) fn begin() {
    EVENTS.take();
    ON.set(true);
    note(Event::BeginsTask);
}

/// Ends the recording; returns all that this thread did since it began.
pub(crate) fn end() -> Task {
    note(Event::Ends);
    ON.set(false);
    let events = EVENTS.take();
    let mut events = events.into_iter();
    let Some((_, begin)) = events.next() else { return Task::default() };
    Task::read(&mut events, begin)
}

/// One run of a parallel loop.
#[derive(Clone, Debug, PartialEq)]
struct Loop {
    place: Place,
    /// Seconds of its own thread since the loop before it ended, or since the task that it belongs to began.
    before: f64,
    tasks: Vec<Task>,
}

/// A task of a loop, or a whole step.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Task {
    loops: Vec<Loop>,
    /// Seconds after the last of its loops.
    after: f64,
}

impl Task {
    fn read(events: &mut impl Iterator<Item = (Event, f64)>, begin: f64) -> Self {
        let (mut task, mut mark) = (Self::default(), begin);
        while let Some((event, at)) = events.next() {
            let since = at - mark;
            let Event::BeginsLoop(place) = event else {
                task.after = since;
                break;
            };
            let mut tasks = Vec::new();
            mark = at;
            while let Some((event, at)) = events.next() {
                mark = at;
                if matches!(event, Event::Ends) {
                    break;
                }
                tasks.push(Self::read(events, at));
            }
            task.loops.push(Loop { place, before: since, tasks });
        }
        task
    }

    /// Seconds outside of its loops.
    fn own(&self) -> f64 {
        self.after + self.loops.iter().map(|inner| inner.before).sum::<f64>()
    }

    /// Seconds on one thread.
    pub(crate) fn work(&self) -> f64 {
        self.own() + self.loops.iter().map(Loop::work).sum::<f64>()
    }

    /// Seconds on `threads` threads.
    pub(crate) fn seconds(&self, threads: usize) -> f64 {
        self.own() + self.loops.iter().map(|inner| inner.seconds(threads)).sum::<f64>()
    }

    /// Where threads wait in a step on `threads` threads, as shares of all their time, the largest first.
    pub(crate) fn waits(&self, threads: usize) -> Vec<Wait> {
        let others = threads as f64 - 1.0;
        let mut waits = BTreeMap::new();
        let mut add = |place: Option<Place>, is_serial, seconds: f64| {
            let key = (place.map(|place| (place.file(), place.line())), is_serial);
            *waits.entry(key).or_insert(0.0) += seconds;
        };
        for inner in &self.loops {
            add(Some(inner.place), true, others * inner.before);
            add(Some(inner.place), false, threads as f64 * inner.seconds(threads) - inner.work());
        }
        add(None, true, others * self.after);
        let all = threads as f64 * self.seconds(threads);
        let wait = |((place, is_serial), seconds)| Wait { place, is_serial, share: seconds / all };
        let mut waits: Vec<Wait> = waits.into_iter().map(wait).collect();
        waits.sort_by(|a, b| b.share.total_cmp(&a.share));
        waits
    }
}

impl Loop {
    fn work(&self) -> f64 {
        self.tasks.iter().map(Task::work).sum()
    }

    fn seconds(&self, threads: usize) -> f64 {
        let mut pieces = Vec::new();
        self.tasks.iter().for_each(|task| pieces_of(task, &mut pieces));
        let mut free = vec![0.0_f64; threads.min(pieces.len()).max(1)];
        for piece in pieces {
            let first = free.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("at least one thread");
            *first += piece;
        }
        // A task with loops of its own cannot end before they do.
        let longest = self.tasks.iter().map(|task| task.seconds(threads));
        free.into_iter().chain(longest).fold(0.0, f64::max)
    }
}

/// What other threads can take from a task: itself without its loops, and their tasks.
fn pieces_of(task: &Task, pieces: &mut Vec<f64>) {
    pieces.push(task.own());
    for inner in task.loops.iter().flat_map(|inner| &inner.tasks) {
        pieces_of(inner, pieces);
    }
}

/// Time that threads wait.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wait {
    /// File and line of the loop that they wait in or for; `None` after the last.
    pub place: Option<(&'static str, u32)>,
    /// Whether one thread works before the loop, and not: the loop has too few or too uneven tasks.
    pub is_serial: bool,
    /// The share of all threads' time.
    pub share: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(own: f64) -> Task {
        Task { loops: Vec::new(), after: own }
    }

    fn of(before: f64, tasks: Vec<Task>) -> Loop {
        Loop { place: Location::caller(), before, tasks }
    }

    #[test]
    fn tasks_are_dealt_out_and_the_rest_is_one_threads() {
        // One second alone, eight tasks of one second, then half a second.
        let step = Task { loops: vec![of(1.0, vec![task(1.0); 8])], after: 0.5 };
        assert_eq!(step.work(), 9.5);
        for (threads, seconds) in [(1, 9.5), (2, 5.5), (3, 4.5), (8, 2.5), (64, 2.5)] {
            assert_eq!(step.seconds(threads), seconds, "{threads}");
        }
        let waits = step.waits(8);
        assert_eq!((waits[0].is_serial, waits[0].share), (true, 7.0 / 20.0));
        let all: f64 = waits.iter().map(|wait| wait.share).sum();
        assert!((all - (1.0 - 9.5 / 20.0)).abs() < 1e-12);
    }

    #[test]
    fn loops_within_tasks_are_shared_out_too() {
        // Two tasks, each with a loop of four.
        let inner = || Task { loops: vec![of(0.0, vec![task(1.0); 4])], after: 0.25 };
        let step = Task { loops: vec![of(0.0, vec![inner(), inner()])], after: 0.0 };
        assert_eq!(step.seconds(1), 8.5);
        assert_eq!(step.seconds(8), 1.25); // a task's end waits for its loop
    }

    #[test]
    fn a_recording_has_the_loops_of_its_thread() {
        let count = |n: usize| (0..n).map(|i| i as f64).sum::<f64>();
        begin();
        assert!(is_on());
        recorded_loop(Location::caller(), || {
            recorded_task(|| {
                count(100_000);
            });
            recorded_task(|| {
                recorded_loop(Location::caller(), || {
                    recorded_task(|| {
                        count(10);
                    });
                });
            });
        });
        recorded_loop(Location::caller(), || {});
        let step = end();
        assert!(!is_on());
        let shape = |step: &Task| step.loops.iter().map(|l| l.tasks.len()).collect::<Vec<_>>();
        assert_eq!(shape(&step), [2, 0]);
        assert_eq!(shape(&step.loops[0].tasks[1]), [1]);
        assert!(step.work() >= step.seconds(2) && step.seconds(2) > 0.0);
    }
}
