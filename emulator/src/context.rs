//! Devices and their primary contexts: how often each is retained, which one is current on a thread, and what dies with it.

use std::cell::RefCell;

use crate::driver::{CallResult, Code, Driver};
use crate::work::Stream;

thread_local! {
    /// The contexts that this thread has made current; the last one is.
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A device. Its primary context exists while someone retains it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Device {
    retained: usize,
    /// The handle; each context has another one, so that one that is gone is never taken for a living one.
    context: usize,
}

/// The context that is current on this thread, dead or alive; 0 if there is none.
pub(crate) fn current() -> usize {
    STACK.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

pub(crate) fn push_current(context: usize) {
    STACK.with_borrow_mut(|stack| stack.push(context));
}

/// Takes the current context from the thread, on which the one before it is current again.
pub(crate) fn pop_current() -> Option<usize> {
    STACK.with_borrow_mut(Vec::pop)
}

impl Driver {
    /// The device of this number.
    pub fn device(&self, number: i32) -> CallResult<usize> {
        let known = usize::try_from(number).ok().filter(|n| *n < self.devices.len());
        known.ok_or(Code::INVALID_DEVICE)
    }

    /// The device of a living context.
    pub fn device_of(&self, context: usize) -> CallResult<usize> {
        let found = self.devices.iter().position(|d| d.retained > 0 && d.context == context);
        found.ok_or(Code::CONTEXT_IS_DESTROYED)
    }

    /// The context that is current on this thread. Fails without one, as the driver's calls do, or if it is gone.
    pub fn in_context(&self) -> CallResult<usize> {
        match current() {
            0 => Err(Code::INVALID_CONTEXT),
            context => self.device_of(context).map(|_| context),
        }
    }

    /// The device of the current context.
    pub fn current_device(&self) -> CallResult<usize> {
        self.in_context().and_then(|context| self.device_of(context))
    }

    pub fn is_active(&self, device: usize) -> bool {
        self.devices[device].retained > 0
    }

    /// Retains a device's primary context, which is made for the first who does.
    pub fn retain(&mut self, device: usize) -> CallResult<usize> {
        if self.devices[device].retained == 0 {
            if !self.memory().begin_context(device) {
                return Err(Code::OUT_OF_MEMORY);
            }
            let context = self.handle();
            self.devices[device].context = context;
            // Its default stream has its handle.
            self.streams.insert(context, Stream { context, ..Stream::default() });
        }
        self.devices[device].retained += 1;
        Ok(self.devices[device].context)
    }

    /// Releases a device's primary context. With the last release it goes, and everything that was made in it: streams with work
    /// that nobody waited for, events, graphs, modules and their functions, memory.
    pub fn release_context(&mut self, device: usize) -> CallResult {
        let Device { retained, context } = self.devices[device];
        self.devices[device].retained = retained.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
        if retained > 1 {
            return Ok(());
        }
        self.captures.retain(|_, capture| {
            self.streams.get(&capture.origin).is_some_and(|stream| stream.context != context)
        });
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.graphs.retain(|_, graph| graph.context != context);
        self.modules.retain(|_, module| module.context != context);
        self.functions.retain(|_, function| function.context != context);
        self.memory().end_context(device, context);
        Ok(())
    }
}
