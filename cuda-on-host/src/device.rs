//! A device in a process of its own: tensors and launches. A kernel that crashes or hangs takes only this process with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::host::Host;

/// A tensor of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    index: usize,
    address: u64,
    /// Its bytes.
    pub size: usize,
}

/// A value that a kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// The address of a tensor.
    Pointer(Tensor),
    /// The bytes of a number.
    Bytes(Vec<u8>),
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether all blocks run together, for barriers across the grid.
    pub cooperative: bool,
    /// Decides the order in which threads and blocks run.
    pub seed: u64,
}

/// Why a launch did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A thread broke a rule; the report names kernel, block, thread and, where known, line.
    Violation(String),
    /// The process ended, or had to be ended; the device is gone.
    Died(String),
    /// The launch cannot be made: no such kernel, or arguments of another type.
    Refused(String),
}

/// A device that holds one kernel library.
#[derive(Debug)]
pub struct Device {
    child: Child,
    input: ChildStdin,
    answers: Receiver<(String, Vec<u8>)>,
    patience: Duration,
    count: usize,
}

impl Device {
    /// Starts a device with the kernel library at `library`. An answer may take `patience`.
    ///
    /// # Errors
    /// A sentence, if the process does not start.
    pub fn new(host: &Host, library: &Path, patience: Duration) -> Result<Self, String> {
        let mut child = Command::new(host.harness())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{} does not start: {e}", host.harness().display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("the device's process has no pipes".into());
        };
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = String::new();
                if !matches!(output.read_line(&mut line), Ok(1..)) {
                    break;
                }
                let size = line
                    .strip_prefix("bytes ")
                    .and_then(|rest| rest.split(' ').next()?.parse().ok());
                let mut bytes = vec![0; size.unwrap_or(0)];
                if output.read_exact(&mut bytes).is_err()
                    || sender.send((line.trim().to_owned(), bytes)).is_err()
                {
                    break;
                }
            }
        });
        let mut device = Self { child, input, answers, patience, count: 0 };
        device.ask(&format!("load {}", library.display()), &[]).map_err(said)?;
        Ok(device)
    }

    /// Sends a command; returns the words after the answer's first, and its bytes.
    fn ask(&mut self, command: &str, bytes: &[u8]) -> Result<(String, Vec<u8>), Failure> {
        let sent = writeln!(self.input, "{command}").and_then(|()| self.input.write_all(bytes));
        let sent = sent.and_then(|()| self.input.flush());
        if sent.is_err() {
            return Err(self.died());
        }
        let (line, bytes) = match self.answers.recv_timeout(self.patience) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => return Err(self.died()),
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill(); // it may have ended by now
                let seconds = self.patience.as_secs();
                return Err(Failure::Died(format!("does not end within {seconds} s")));
            }
        };
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "done" | "bytes" => Ok((rest.to_owned(), bytes)),
            "violation" => Err(Failure::Violation(rest.to_owned())),
            "full" => Err(Failure::Refused("the tensors take more than 2 GiB".into())),
            _ => Err(Failure::Refused(line)),
        }
    }

    fn died(&mut self) -> Failure {
        let how = self.child.wait().map_or("ends".into(), |status| status.to_string());
        Failure::Died(format!("ends the process ({how})"))
    }

    /// Allocates a tensor between guards, filled with NaN and never written.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn allocate(&mut self, name: &str, size: usize) -> Result<Tensor, Failure> {
        let (address, _) = self.ask(&format!("alloc {size} {name}"), &[])?;
        let address = address.parse().map_err(|_| Failure::Refused(address.clone()))?;
        self.count += 1;
        Ok(Tensor { index: self.count - 1, address, size })
    }

    /// Frees all tensors.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn reset(&mut self) -> Result<(), Failure> {
        self.count = 0;
        self.ask("reset", &[]).map(drop)
    }

    /// Fills a tensor with NaN and marks it as never written.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn poison(&mut self, tensor: Tensor) -> Result<(), Failure> {
        self.ask(&format!("poison {}", tensor.index), &[]).map(drop)
    }

    /// Writes a tensor.
    ///
    /// # Errors
    /// If the process is gone.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn write(&mut self, tensor: Tensor, bytes: &[u8]) -> Result<(), Failure> {
        assert_eq!(bytes.len(), tensor.size, "a tensor is written as a whole");
        self.ask(&format!("write {}", tensor.index), bytes).map(drop)
    }

    /// Reads a tensor, and the offset of the first byte that was never written.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn read(&mut self, tensor: Tensor) -> Result<(Vec<u8>, Option<usize>), Failure> {
        let (words, bytes) = self.ask(&format!("read {}", tensor.index), &[])?;
        let unwritten = words.split(' ').nth(1).and_then(|n| n.parse::<usize>().ok());
        Ok((bytes, unwritten.filter(|&at| at < tensor.size)))
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// If a thread breaks a rule, the process dies or the arguments do not fit.
    pub fn launch(
        &mut self,
        kernel: &str,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), Failure> {
        let triple = |sizes: [u32; 3]| sizes.map(|size| size.to_string()).join(" ");
        let Launch { grid, block, shared, cooperative, seed } = *launch;
        let mut command = format!(
            "launch {kernel} {} {} {shared} {} {seed} {}",
            triple(grid),
            triple(block),
            u8::from(cooperative),
            arguments.len()
        );
        for argument in arguments {
            let bytes = match argument {
                Value::Pointer(tensor) => tensor.address.to_ne_bytes().to_vec(),
                Value::Bytes(bytes) => bytes.clone(),
            };
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            command += &format!(" {} {hex}", bytes.len());
        }
        self.ask(&command, &[]).map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A failure as a sentence.
pub fn said(failure: Failure) -> String {
    match failure {
        Failure::Violation(text) | Failure::Died(text) | Failure::Refused(text) => text,
    }
}
