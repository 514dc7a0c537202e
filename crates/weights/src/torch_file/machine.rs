//! A pickle machine that builds values and calls nothing.
//!
//! It knows the opcodes of protocols 2 to 5 that write data, and the classes of [`resolve`]. `REDUCE` on a function that rebuilds a
//! tensor notes what the arguments claim; on a class of plain data it leaves a placeholder. There is no opcode by which a file could make
//! this program run, import or open anything.

use std::collections::HashMap;

use super::problem::TorchFileProblem;
use super::reader::PickleReader;
use super::value::{Id, Pickle, Value, resolve};

/// Steps that one pickle may take; the largest models need some hundred thousand.
const MAX_WORK: u64 = 1 << 24;
/// Values that it may make.
const MAX_VALUES: usize = 1 << 21;

const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;

/// Reads the pickle at the beginning of `bytes`.
pub(super) fn read(bytes: &[u8]) -> Result<Pickle, TorchFileProblem> {
    let mut machine = Machine {
        reader: PickleReader::new(bytes),
        values: vec![Value::None, Value::Bool(false), Value::Bool(true)],
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        work: 0,
    };
    let root = machine.run()?;
    Ok(Pickle { values: machine.values, root, length: machine.reader.at() })
}

pub(super) struct Machine<'a> {
    reader: PickleReader<'a>,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at each open MARK.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    work: u64,
}

pub(super) type Step<T = ()> = Result<T, TorchFileProblem>;

impl Machine<'_> {
    fn run(&mut self) -> Step<Id> {
        loop {
            self.charge(1)?;
            let opcode = self.reader.u8()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Step {
        match opcode {
            // PROTO, FRAME: nothing depends on them.
            0x80 => self.reader.u8().map(drop),
            0x95 => self.reader.u64().map(drop),
            b'N' => self.push_id(NONE),
            0x88 => self.push_id(TRUE),
            0x89 => self.push_id(FALSE),
            b'K' => self.reader.u8().and_then(|n| self.push(Value::Int(n.into()))),
            b'M' => self.reader.u16().and_then(|n| self.push(Value::Int(n.into()))),
            b'J' => self.reader.i32().and_then(|n| self.push(Value::Int(n.into()))),
            b'G' => self.reader.f64_big_endian().and_then(|x| self.push(Value::Float(x))),
            0x8a => self.reader.u8().and_then(|n| self.long(n.into())),
            0x8b => self.reader.u32().and_then(|n| self.long(n.into())),
            // Text, and Python 2's strings, which stand for both text and bytes.
            0x8c | b'U' => self.reader.u8().and_then(|n| self.text(n.into(), opcode == 0x8c)),
            b'X' | b'T' => self.reader.u32().and_then(|n| self.text(n.into(), opcode == b'X')),
            0x8d => self.reader.u64().and_then(|n| self.text(n, true)),
            b'C' => self.reader.u8().and_then(|n| self.bytes(n.into())),
            b'B' => self.reader.u32().and_then(|n| self.bytes(n.into())),
            0x8e | 0x96 => self.reader.u64().and_then(|n| self.bytes(n)),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.discard(),
            b'1' => self.pop_mark().map(drop),
            b'2' => self.top().and_then(|id| self.push_id(id)),
            b')' => self.push(Value::Tuple(Vec::new())),
            0x85..=0x87 => self.small_tuple(usize::from(opcode - 0x84)),
            b't' => self.pop_mark().and_then(|items| self.push(Value::Tuple(items))),
            b']' => self.push(Value::List(Vec::new())),
            b'l' => self.pop_mark().and_then(|items| self.push(Value::List(items))),
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => self.pop_mark().and_then(|items| self.pairs(items)).and_then(|pairs| self.push(Value::Dict(pairs))),
            0x8f => self.push(Value::Opaque),
            0x91 => self.pop_mark().and_then(|_| self.push(Value::Opaque)),
            b'a' => self.pop().and_then(|item| self.append(vec![item])),
            b'e' | 0x90 => self.pop_mark().and_then(|items| self.append(items)),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.assign(vec![(key, value)])
            }
            b'u' => self.pop_mark().and_then(|items| self.pairs(items)).and_then(|pairs| self.assign(pairs)),
            b'q' => self.reader.u8().and_then(|n| self.remember(n.into())),
            b'r' => self.reader.u32().and_then(|n| self.remember(n)),
            0x94 => self.remember(self.memo.len() as u32),
            b'h' => self.reader.u8().and_then(|n| self.recall(n.into())),
            b'j' => self.reader.u32().and_then(|n| self.recall(n)),
            b'c' => {
                let (module, name) = (self.reader.line()?, self.reader.line()?);
                resolve(&module, &name).and_then(|global| self.push(Value::Global(global)))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (self.get(module), self.get(name)) else {
                    return Err(self.damaged("a global whose names are no text"));
                };
                resolve(module, name).and_then(|global| self.push(Value::Global(global)))
            }
            b'Q' => self.persistent(),
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments)
            }
            0x92 => {
                let (_keywords, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, arguments)
            }
            // BUILD: the object's own attributes, of which none is a named tensor.
            b'b' => self.pop().and_then(|_| self.top().map(drop)),
            // INST and OBJ make objects of old classes; their class must be known like any other.
            b'i' => {
                let (module, name) = (self.reader.line()?, self.reader.line()?);
                resolve(&module, &name)?;
                self.pop_mark().and_then(|_| self.push(Value::Opaque))
            }
            b'o' => self.pop_mark().and_then(|_| self.push(Value::Opaque)),
            other => Err(self.damaged(&format!("opcode {other:#04x} is none that a file of tensors needs"))),
        }
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    pub(super) fn damaged(&self, message: &str) -> TorchFileProblem {
        TorchFileProblem::Pickle { at: self.reader.at(), message: message.to_string() }
    }

    /// Counts steps, so that a small file cannot keep the program busy.
    pub(super) fn charge(&mut self, steps: usize) -> Step {
        self.work += steps as u64;
        let limit = MAX_WORK;
        if self.work <= limit { Ok(()) } else { Err(TorchFileProblem::Limit { what: "pickle's operations", limit }) }
    }

    pub(super) fn push(&mut self, value: Value) -> Step {
        if self.values.len() >= MAX_VALUES {
            return Err(TorchFileProblem::Limit { what: "pickle's values", limit: MAX_VALUES as u64 });
        }
        self.values.push(value);
        self.push_id((self.values.len() - 1) as Id)
    }

    pub(super) fn push_id(&mut self, id: Id) -> Step {
        self.stack.push(id);
        Ok(())
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.get(floor..).and_then(|above| above.last());
        top.copied().ok_or_else(|| self.damaged("it takes from an empty stack"))
    }

    pub(super) fn pop(&mut self) -> Step<Id> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    /// POP takes a value, or a MARK that nothing stands on.
    fn discard(&mut self) -> Step {
        if self.marks.last() == Some(&self.stack.len()) {
            self.marks.pop();
            return Ok(());
        }
        self.pop().map(drop)
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("a collection ends that never began"))?;
        Ok(self.stack.split_off(mark))
    }

    fn small_tuple(&mut self, length: usize) -> Step {
        let mut items = Vec::with_capacity(length);
        for _ in 0..length {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn pairs(&self, items: Vec<Id>) -> Step<Vec<(Id, Id)>> {
        if !items.len().is_multiple_of(2) {
            return Err(self.damaged("a dictionary's last key has no value"));
        }
        Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    /// Items for a list; those of a set or of a list class are skipped.
    fn append(&mut self, items: Vec<Id>) -> Step {
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::List(list) => list.extend(items),
            Value::Opaque => {}
            _ => return Err(self.damaged("it appends to what is no list")),
        }
        Ok(())
    }

    fn assign(&mut self, pairs: Vec<(Id, Id)>) -> Step {
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::Dict(dict) => dict.extend(pairs),
            Value::Opaque => {}
            _ => return Err(self.damaged("it assigns to a key of what is no dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, place: u32) -> Step {
        let top = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return Err(TorchFileProblem::Limit { what: "pickle's memos", limit: MAX_VALUES as u64 });
        }
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Step {
        let id = self.memo.get(&place).copied();
        let id = id.ok_or_else(|| self.damaged(&format!("memo {place} is used before it is set")))?;
        self.push_id(id)
    }

    fn long(&mut self, length: u64) -> Step {
        let bytes = self.reader.take(length)?.to_vec();
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut word = [if negative { 0xff } else { 0 }; 8];
        if bytes.len() > 8 {
            return self.push(Value::Long(bytes));
        }
        word[..bytes.len()].copy_from_slice(&bytes);
        self.push(Value::Int(i64::from_le_bytes(word)))
    }

    fn text(&mut self, length: u64, must_be_utf8: bool) -> Step {
        let bytes = self.reader.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push(Value::Text(text.to_string())),
            Err(_) if must_be_utf8 => Err(self.damaged("a text that is not UTF-8")),
            Err(_) => self.push(Value::Opaque),
        }
    }

    fn bytes(&mut self, length: u64) -> Step {
        self.reader.take(length)?;
        self.push(Value::Opaque)
    }
}
