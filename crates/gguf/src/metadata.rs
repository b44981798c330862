//! Metadata: the typed values that a file carries under string keys.
//!
//! Numbers are asked for by what they mean: any integer type that holds the value answers for a `u64`, because writers
//! differ in the width that they choose.

use crate::error::GgufError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Types of values, numbered as in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say all")]
#[repr(u8)]
pub enum ValueKind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [ValueKind; 13] = [
        ValueKind::U8,
        ValueKind::I8,
        ValueKind::U16,
        ValueKind::I16,
        ValueKind::U32,
        ValueKind::I32,
        ValueKind::F32,
        ValueKind::Bool,
        ValueKind::Str,
        ValueKind::Array,
        ValueKind::U64,
        ValueKind::I64,
        ValueKind::F64,
    ];

    /// The kind that a file calls `id`.
    pub fn from_id(id: u32) -> Option<ValueKind> {
        ValueKind::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// The number in a file.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The fewest bytes that a value of this kind takes in a file.
    pub const fn bytes_min(self) -> u64 {
        match self {
            ValueKind::U8 | ValueKind::I8 | ValueKind::Bool => 1,
            ValueKind::U16 | ValueKind::I16 => 2,
            ValueKind::U32 | ValueKind::I32 | ValueKind::F32 => 4,
            // A string has its length, an array also the type of its elements.
            ValueKind::U64 | ValueKind::I64 | ValueKind::F64 | ValueKind::Str => 8,
            ValueKind::Array => 12,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ValueKind::U8 => "u8",
            ValueKind::I8 => "i8",
            ValueKind::U16 => "u16",
            ValueKind::I16 => "i16",
            ValueKind::U32 => "u32",
            ValueKind::I32 => "i32",
            ValueKind::F32 => "f32",
            ValueKind::Bool => "bool",
            ValueKind::Str => "string",
            ValueKind::Array => "array",
            ValueKind::U64 => "u64",
            ValueKind::I64 => "i64",
            ValueKind::F64 => "f64",
        }
    }
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say all")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Values of one type.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say all")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Str(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// The value's type.
    pub fn kind(&self) -> ValueKind {
        match self {
            Value::U8(_) => ValueKind::U8,
            Value::I8(_) => ValueKind::I8,
            Value::U16(_) => ValueKind::U16,
            Value::I16(_) => ValueKind::I16,
            Value::U32(_) => ValueKind::U32,
            Value::I32(_) => ValueKind::I32,
            Value::F32(_) => ValueKind::F32,
            Value::Bool(_) => ValueKind::Bool,
            Value::Str(_) => ValueKind::Str,
            Value::Array(_) => ValueKind::Array,
            Value::U64(_) => ValueKind::U64,
            Value::I64(_) => ValueKind::I64,
            Value::F64(_) => ValueKind::F64,
        }
    }

    fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::I8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::I16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::I32(value) => Some(value.into()),
            Value::U64(value) => Some(value.into()),
            Value::I64(value) => Some(value.into()),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        match self {
            Value::Array(array) => format!("an array of {} {}", array.len(), array.kind().name()),
            Value::Str(_) => "a string".to_owned(),
            Value::Bool(value) => format!("the bool {value}"),
            Value::F32(value) => format!("the f32 {value}"),
            Value::F64(value) => format!("the f64 {value}"),
            _ => format!("the {} {}", self.kind().name(), self.integer().unwrap_or_default()),
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Str(text.to_owned())
    }
}

impl Array {
    /// The type of the elements.
    pub fn kind(&self) -> ValueKind {
        match self {
            Array::U8(_) => ValueKind::U8,
            Array::I8(_) => ValueKind::I8,
            Array::U16(_) => ValueKind::U16,
            Array::I16(_) => ValueKind::I16,
            Array::U32(_) => ValueKind::U32,
            Array::I32(_) => ValueKind::I32,
            Array::F32(_) => ValueKind::F32,
            Array::Bool(_) => ValueKind::Bool,
            Array::Str(_) => ValueKind::Str,
            Array::Array(_) => ValueKind::Array,
            Array::U64(_) => ValueKind::U64,
            Array::I64(_) => ValueKind::I64,
            Array::F64(_) => ValueKind::F64,
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(values) => values.len(),
            Array::I8(values) => values.len(),
            Array::U16(values) => values.len(),
            Array::I16(values) => values.len(),
            Array::U32(values) => values.len(),
            Array::I32(values) => values.len(),
            Array::F32(values) => values.len(),
            Array::Bool(values) => values.len(),
            Array::Str(values) => values.len(),
            Array::Array(values) => values.len(),
            Array::U64(values) => values.len(),
            Array::I64(values) => values.len(),
            Array::F64(values) => values.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn integers<T: TryFrom<i128>>(&self) -> Option<Vec<T>> {
        fn all<S: Copy + Into<i128>, T: TryFrom<i128>>(values: &[S]) -> Option<Vec<T>> {
            values.iter().map(|value| T::try_from((*value).into()).ok()).collect()
        }
        match self {
            Array::U8(values) => all(values),
            Array::I8(values) => all(values),
            Array::U16(values) => all(values),
            Array::I16(values) => all(values),
            Array::U32(values) => all(values),
            Array::I32(values) => all(values),
            Array::U64(values) => all(values),
            Array::I64(values) => all(values),
            _ => None,
        }
    }
}

/// What a value can be asked for as.
pub trait FromValue<'a>: Sized {
    /// The words for an error: what is needed.
    const EXPECTED: &'static str;

    /// The value as this type; `None` if it is of another type or out of range.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! integers {
    ($($integer:ty: $one:literal, $many:literal;)*) => {$(
        impl FromValue<'_> for $integer {
            const EXPECTED: &'static str = $one;

            fn from_value(value: &Value) -> Option<Self> {
                value.integer().and_then(|value| value.try_into().ok())
            }
        }

        impl FromValue<'_> for Vec<$integer> {
            const EXPECTED: &'static str = $many;

            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::Array(array) => array.integers(),
                    _ => None,
                }
            }
        }
    )*};
}

integers! {
    u8: "an integer from 0 to 255", "an array of integers from 0 to 255";
    u32: "an integer of 32 bits, not negative", "an array of integers of 32 bits, not negative";
    i32: "an integer of 32 bits", "an array of integers of 32 bits";
    u64: "an integer that is not negative", "an array of integers that are not negative";
    i64: "an integer", "an array of integers";
    usize: "an integer that is not negative", "an array of integers that are not negative";
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a float";

    /// An f64 rounds to the nearest f32; an integer is no float.
    fn from_value(value: &Value) -> Option<f32> {
        match *value {
            Value::F32(value) => Some(value),
            Value::F64(value) => Some(value as f32),
            _ => None,
        }
    }
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<f64> {
        match *value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a bool";

    fn from_value(value: &Value) -> Option<bool> {
        match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";

    fn from_value(value: &'a Value) -> Option<&'a str> {
        match value {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }
}

macro_rules! slices {
    ($($element:ty: $variant:ident, $expected:literal;)*) => {$(
        impl<'a> FromValue<'a> for &'a [$element] {
            const EXPECTED: &'static str = $expected;

            fn from_value(value: &'a Value) -> Option<Self> {
                match value {
                    Value::Array(Array::$variant(values)) => Some(values),
                    _ => None,
                }
            }
        }
    )*};
}

slices! {
    String: Str, "an array of strings";
    f32: F32, "an array of f32";
    f64: F64, "an array of f64";
    bool: Bool, "an array of bools";
    Array: Array, "an array of arrays";
}

/// All keys of a file, in the file's order, each once.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    places: BTreeMap<String, usize>,
}

impl Metadata {
    pub(crate) fn new(path: &Path) -> Metadata {
        Metadata { path: path.to_owned(), entries: Vec::new(), places: BTreeMap::new() }
    }

    /// False, and nothing changes, if the key is there already.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        if self.places.contains_key(&key) {
            return false;
        }
        self.places.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        true
    }

    /// The value as the file has it.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.places.get(key).map(|place| &self.entries[*place].1)
    }

    /// The value as a `T`: `get::<u64>("llama.block_count")`, `get::<&[String]>("tokenizer.ggml.tokens")`. `None` if
    /// the key is absent, an error if its value is something else.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let wrong = || GgufError::KeyType {
            path: self.path.clone(),
            key: key.to_owned(),
            found: value.describe(),
            expected: T::EXPECTED,
        };
        T::from_value(value).map(Some).ok_or_else(wrong)
    }

    /// Like [`Metadata::get`], but absence is an error, too.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        let missing = || GgufError::NoKey { path: self.path.clone(), key: key.to_owned() };
        self.get(key)?.ok_or_else(missing)
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }
}
