//! A function made of bytes: some can be written, some are cleared by ones, and every access is counted.

use std::cell::RefCell;
use std::io;

use pciback::config::{Access, ConfigSpace, Width};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub write: bool,
    pub offset: u16,
    pub width: Width,
}

#[derive(Clone)]
pub struct Hardware {
    pub bytes: RefCell<Vec<u8>>,
    pub writable: Vec<u8>,
    pub cleared_by_one: Vec<u8>,
    pub seen: RefCell<Vec<Seen>>,
    pub fails: bool,
}

impl Hardware {
    pub fn new(size: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; size]),
            writable: vec![0; size],
            cleared_by_one: vec![0; size],
            seen: RefCell::default(),
            fails: false,
        }
    }

    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes.get_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub fn put16(&mut self, offset: usize, value: u16) {
        self.put(offset, &value.to_le_bytes());
    }

    pub fn put32(&mut self, offset: usize, value: u32) {
        self.put(offset, &value.to_le_bytes());
    }

    pub fn writable32(&mut self, offset: usize, mask: u32) {
        self.writable[offset..offset + 4].copy_from_slice(&mask.to_le_bytes());
    }

    pub fn cleared_by_one32(&mut self, offset: usize, mask: u32) {
        self.cleared_by_one[offset..offset + 4].copy_from_slice(&mask.to_le_bytes());
    }

    pub fn take_seen(&self) -> Vec<Seen> {
        self.seen.take()
    }
}

impl ConfigSpace for Hardware {
    fn size(&self) -> u16 {
        self.writable.len() as u16
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.seen.borrow_mut().push(Seen { write: false, offset: access.offset(), width: access.width() });
        if self.fails {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        let bytes = self.bytes.borrow();
        let range = usize::from(access.offset())..usize::from(access.offset() + access.width().bytes());
        Ok(bytes[range].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.seen.borrow_mut().push(Seen { write: true, offset: access.offset(), width: access.width() });
        if self.fails {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        let mut bytes = self.bytes.borrow_mut();
        for index in 0..usize::from(access.width().bytes()) {
            let (at, written) = (usize::from(access.offset()) + index, value.to_le_bytes()[index]);
            let kept = bytes[at] & !self.writable[at] & !(self.cleared_by_one[at] & written);
            bytes[at] = kept | written & self.writable[at];
        }
        Ok(())
    }
}
