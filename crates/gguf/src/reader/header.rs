//! One file's header: version, metadata and tensor infos, checked against the file's length and one another.

use super::cursor::HeaderCursor;
use super::tensor::TensorInfo;
use crate::error::GgufError;
use crate::metadata::{Array, Metadata, Value, ValueKind};
use crate::types::TensorType;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

/// Alignment of tensor data where `general.alignment` is absent.
pub(crate) const ALIGNMENT_DEFAULT: u64 = 32;

/// Most axes of a tensor; ggml has no more.
pub(crate) const DIMS_MAX: usize = 4;

/// Longest key, as the format prescribes.
pub(crate) const KEY_BYTES_MAX: usize = 65535;

/// How deep arrays may nest.
const ARRAY_DEPTH_MAX: usize = 4;

/// Bytes of the shortest entry: a key's length, one letter, a type and a value.
const ENTRY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;

/// Bytes of the shortest tensor info: a name's length, one letter, axes, one axis, type, offset.
const TENSOR_INFO_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8;

#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    /// In the file's order, with offsets from the file's start.
    pub(super) tensors: Vec<TensorInfo>,
    /// Where the tensors' data begin, in bytes: there is nothing of the header behind.
    pub(super) data_start: u64,
}

/// Reads the header of file number `file_index`, which is `length` bytes long.
pub(super) fn read(file: &File, path: &Path, length: u64, file_index: usize) -> Result<Header, GgufError> {
    let mut cursor = HeaderCursor::new(file, path, length);
    check_version(&mut cursor, path)?;
    let tensor_count = cursor.count(TENSOR_INFO_BYTES_MIN, "tensors")?;
    let entry_count = cursor.count(ENTRY_BYTES_MIN, "metadata entries")?;
    let mut metadata = Metadata::new(path);
    let mut alignment = ALIGNMENT_DEFAULT;
    for _ in 0..entry_count {
        let at = cursor.at();
        let key = cursor.string("a key")?;
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(cursor.corrupt(at, format!("a key has {} bytes, 1 to 65535 are allowed", key.len())));
        }
        let value_at = cursor.at();
        let value = value(&mut cursor, &key)?;
        if key == "general.alignment" {
            alignment = checked_alignment(&value).map_err(|reason| cursor.corrupt(value_at, reason))?;
        }
        if !metadata.insert(key.clone(), value) {
            return Err(cursor.corrupt(at, format!("the key `{key}` appears twice")));
        }
    }
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    let mut info_at = Vec::new();
    for _ in 0..tensor_count {
        let at = cursor.at();
        let info = tensor_info(&mut cursor, path, file_index, alignment)?;
        if !names.insert(info.name.clone()) {
            return Err(cursor.corrupt(at, format!("the tensor `{}` appears twice", info.name)));
        }
        tensors.push(info);
        info_at.push(at);
    }
    // The header ends below 512 MiB and the alignment fits 32 bits, so this cannot overflow.
    let data_start = cursor.at().next_multiple_of(alignment);
    for (info, at) in tensors.iter_mut().zip(info_at) {
        let end = data_start.checked_add(info.offset).and_then(|start| start.checked_add(info.bytes));
        if end.is_none_or(|end| end > length) {
            let reason = format!(
                "tensor `{}` has {} bytes from {data_start} + {} on, but the file ends at {length}",
                info.name, info.bytes, info.offset
            );
            return Err(cursor.corrupt(at, reason));
        }
        info.offset += data_start;
    }
    check_overlap(&cursor, &tensors)?;
    Ok(Header { metadata, tensors, data_start })
}

fn check_version(cursor: &mut HeaderCursor<'_>, path: &Path) -> Result<(), GgufError> {
    let unsupported = |reason: String| GgufError::Unsupported { path: path.to_owned(), reason };
    let magic = cursor.array::<4>("the magic number")?;
    if &magic != b"GGUF" {
        let magic = magic.escape_ascii();
        return Err(unsupported(format!(
            "it starts with `{magic}` instead of `GGUF`, so it is no GGUF file"
        )));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => Ok(()),
        1 => Err(unsupported("it is GGUF version 1, of before August 2023: convert it to version 3".into())),
        version if version != 0 && version.is_multiple_of(1 << 16) => {
            Err(unsupported("it is big-endian: convert it to little-endian".into()))
        }
        version => Err(unsupported(format!("it is GGUF version {version}: versions 2 and 3 are read"))),
    }
}

fn checked_alignment(value: &Value) -> Result<u64, String> {
    let alignment = match value {
        Value::U32(alignment) => u64::from(*alignment),
        // Version 3 prescribes u32, but nothing is ambiguous about another integer.
        Value::U64(alignment) => *alignment,
        _ => return Err("`general.alignment` is not a u32".into()),
    };
    if !alignment.is_power_of_two() || alignment > 1 << 31 {
        return Err(format!("`general.alignment` is {alignment}, which is not a power of two below 2^32"));
    }
    Ok(alignment)
}

fn value(cursor: &mut HeaderCursor<'_>, key: &str) -> Result<Value, GgufError> {
    let kind = value_kind(cursor, key)?;
    let what = &format!("the value of `{key}`");
    Ok(match kind {
        ValueKind::U8 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        ValueKind::I8 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        ValueKind::U16 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        ValueKind::I16 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        ValueKind::U32 => Value::U32(u32::from_le_bytes(cursor.array(what)?)),
        ValueKind::I32 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        ValueKind::F32 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        ValueKind::U64 => Value::U64(u64::from_le_bytes(cursor.array(what)?)),
        ValueKind::I64 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        ValueKind::F64 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        ValueKind::Bool => Value::Bool(boolean(cursor, what)?),
        ValueKind::Str => Value::Str(cursor.string(what)?),
        ValueKind::Array => Value::Array(array(cursor, key, what, 1)?),
    })
}

fn value_kind(cursor: &mut HeaderCursor<'_>, key: &str) -> Result<ValueKind, GgufError> {
    let at = cursor.at();
    let id = cursor.u32("a value's type")?;
    ValueKind::from_id(id)
        .ok_or_else(|| cursor.corrupt(at, format!("`{key}` has the unknown value type {id}")))
}

fn boolean(cursor: &mut HeaderCursor<'_>, what: &str) -> Result<bool, GgufError> {
    let at = cursor.at();
    match cursor.array(what)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(cursor.corrupt(at, format!("{what} is a bool of {other}, only 0 and 1 exist"))),
    }
}

fn array(cursor: &mut HeaderCursor<'_>, key: &str, what: &str, depth: usize) -> Result<Array, GgufError> {
    let at = cursor.at();
    if depth > ARRAY_DEPTH_MAX {
        return Err(cursor.corrupt(at, format!("{what} nests arrays deeper than {ARRAY_DEPTH_MAX}")));
    }
    let kind = value_kind(cursor, key)?;
    let count = cursor.count(kind.bytes_min(), what)?;
    Ok(match kind {
        ValueKind::U8 => Array::U8(cursor.bytes(count as u64, what)?.to_vec()),
        ValueKind::I8 => Array::I8(numbers(cursor, count, what, i8::from_le_bytes)?),
        ValueKind::U16 => Array::U16(numbers(cursor, count, what, u16::from_le_bytes)?),
        ValueKind::I16 => Array::I16(numbers(cursor, count, what, i16::from_le_bytes)?),
        ValueKind::U32 => Array::U32(numbers(cursor, count, what, u32::from_le_bytes)?),
        ValueKind::I32 => Array::I32(numbers(cursor, count, what, i32::from_le_bytes)?),
        ValueKind::F32 => Array::F32(numbers(cursor, count, what, f32::from_le_bytes)?),
        ValueKind::U64 => Array::U64(numbers(cursor, count, what, u64::from_le_bytes)?),
        ValueKind::I64 => Array::I64(numbers(cursor, count, what, i64::from_le_bytes)?),
        ValueKind::F64 => Array::F64(numbers(cursor, count, what, f64::from_le_bytes)?),
        ValueKind::Bool => Array::Bool((0..count).map(|_| boolean(cursor, what)).collect::<Result<_, _>>()?),
        ValueKind::Str => Array::Str((0..count).map(|_| cursor.string(what)).collect::<Result<_, _>>()?),
        ValueKind::Array => {
            let nested = (0..count).map(|_| array(cursor, key, what, depth + 1));
            Array::Array(nested.collect::<Result<_, _>>()?)
        }
    })
}

fn numbers<const N: usize, T>(
    cursor: &mut HeaderCursor<'_>,
    count: usize,
    what: &str,
    from_bytes: fn([u8; N]) -> T,
) -> Result<Vec<T>, GgufError> {
    (0..count).map(|_| cursor.array(what).map(from_bytes)).collect()
}

/// One tensor info; its offset is still relative to the data.
fn tensor_info(
    cursor: &mut HeaderCursor<'_>,
    path: &Path,
    file: usize,
    alignment: u64,
) -> Result<TensorInfo, GgufError> {
    let at = cursor.at();
    let name = cursor.string("a tensor's name")?;
    if name.is_empty() {
        return Err(cursor.corrupt(at, "a tensor has no name"));
    }
    let what = &format!("tensor `{name}`");
    let dims_at = cursor.at();
    let dim_count = cursor.u32(what)? as usize;
    if dim_count == 0 || dim_count > DIMS_MAX {
        return Err(
            cursor.corrupt(dims_at, format!("{what} has {dim_count} axes, 1 to {DIMS_MAX} are allowed"))
        );
    }
    let dims = numbers(cursor, dim_count, what, u64::from_le_bytes)?;
    let tensor_type = TensorType::from_id(cursor.u32(what)?);
    let tensor_type = tensor_type.map_err(|source| GgufError::TensorType {
        path: path.to_owned(),
        name: name.clone(),
        source,
    })?;
    let bytes = tensor_bytes(tensor_type, &dims)
        .map_err(|reason| cursor.corrupt(dims_at, format!("{what} {reason}")))?;
    let offset_at = cursor.at();
    let offset = cursor.u64(what)?;
    if !offset.is_multiple_of(alignment) {
        let reason = format!("{what} starts at {offset}, which is no multiple of the alignment {alignment}");
        return Err(cursor.corrupt(offset_at, reason));
    }
    Ok(TensorInfo { name, tensor_type, dims, file, offset, bytes })
}

/// Bytes of a tensor, or what is wrong with its axes.
pub(crate) fn tensor_bytes(tensor_type: TensorType, dims: &[u64]) -> Result<u64, String> {
    if dims.contains(&0) {
        return Err(format!("has an empty axis: {dims:?}"));
    }
    let elements = dims.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let elements = elements.filter(|elements| usize::try_from(*elements).is_ok());
    let elements = elements.ok_or_else(|| format!("has more elements than can be counted: {dims:?}"))?;
    let block_len = tensor_type.block_len() as u64;
    if !dims[0].is_multiple_of(block_len) {
        return Err(format!(
            "has rows of {} values, {tensor_type} needs whole blocks of {block_len}",
            dims[0]
        ));
    }
    let bytes = tensor_type.bytes_of(elements).filter(|bytes| usize::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| format!("has more bytes than can be counted: {dims:?}"))
}

fn check_overlap(cursor: &HeaderCursor<'_>, tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|info| info.offset);
    for pair in by_offset.windows(2) {
        let end = pair[0].offset + pair[0].bytes;
        if end > pair[1].offset {
            let reason =
                format!("tensor `{}` starts before `{}` ends, at byte {end}", pair[1].name, pair[0].name);
            return Err(cursor.corrupt(pair[1].offset, reason));
        }
    }
    Ok(())
}
