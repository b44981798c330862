//! The API reference: what each route takes and answers, as an OpenAPI document and as a page to browse offline.
//!
//! Each route of the [router](crate::router) names its operations here, so that the reference lists exactly what is served; tests
//! hold its fields against what handlers really read. Layout: `openapi` (the document), then tables by subject.

mod admin;
mod inference;
mod models;
mod openapi;
mod system;
mod tuning;

pub(crate) use openapi::document;

use crate::access::Access;
use axum::http::Method;

pub(crate) use admin::*;
pub(crate) use inference::*;
pub(crate) use models::*;
pub(crate) use system::*;
pub(crate) use tuning::*;

/// One method of one path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operation {
    pub(crate) verb: Verb,
    /// What it asks of a key.
    pub(crate) access: Access,
    /// What it is about: the heading that it stands under.
    pub(crate) subject: &'static str,
    /// In a few words.
    pub(crate) summary: &'static str,
    /// More, where the words above are not enough.
    pub(crate) details: &'static str,
    /// What the path holds in braces, and what may follow its question mark.
    pub(crate) parameters: &'static [Parameter],
    pub(crate) body: Body,
    pub(crate) answer: Answer,
}

/// What is done with what the path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Get,
    Post,
    Patch,
    Delete,
}

impl Verb {
    pub(crate) fn method(self) -> Method {
        match self {
            Verb::Get => Method::GET,
            Verb::Post => Method::POST,
            Verb::Patch => Method::PATCH,
            Verb::Delete => Method::DELETE,
        }
    }

    /// As OpenAPI writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Verb::Get => "get",
            Verb::Post => "post",
            Verb::Patch => "patch",
            Verb::Delete => "delete",
        }
    }
}

/// A part of the address.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: &'static str,
    pub(crate) place: Place,
    pub(crate) kind: Kind,
    pub(crate) about: &'static str,
}

/// Where a parameter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Path,
    Query,
}

/// What is to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Body {
    None,
    /// A JSON object of these fields, of several lists.
    Json(&'static [&'static [Field]]),
    /// A form with a file.
    Multipart(&'static [Field]),
}

/// A field of an object.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) required: bool,
    pub(crate) about: &'static str,
}

/// What a value may be.
#[derive(Debug)]
pub(crate) enum Kind {
    Bool,
    Text,
    /// One of these.
    OneOf(&'static [&'static str]),
    Integer(i64, i64),
    Number(f64, f64),
    /// A list of such values.
    List(&'static Kind),
    /// An object of these fields.
    Object(&'static [Field]),
    /// An object of any names.
    Map,
    /// Either of several.
    Any(&'static [Kind]),
    /// Bytes of a file.
    File,
}

/// What comes back when all goes well.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Answer {
    /// JSON, like this.
    Json(&'static str),
    /// JSON like this, or events of it where the request asks for a stream.
    JsonOrEvents(&'static str),
    Text(&'static str),
    Page,
    Bytes,
}

/// A field that may be left out.
pub(crate) const fn field(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, required: false, about }
}

/// A field that must be there.
pub(crate) const fn required(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, required: true, about }
}

/// A part of the path.
pub(crate) const fn in_path(name: &'static str, about: &'static str) -> Parameter {
    Parameter { name, place: Place::Path, kind: Kind::Text, about }
}

/// A part of what follows the question mark.
pub(crate) const fn in_query(name: &'static str, kind: Kind, about: &'static str) -> Parameter {
    Parameter { name, place: Place::Query, kind, about }
}

/// An operation that reads.
pub(crate) const fn get(subject: &'static str, summary: &'static str, answer: Answer) -> Operation {
    // Whatever says nothing else is for those who may do everything.
    let access = Access::Admin;
    Operation {
        verb: Verb::Get,
        access,
        subject,
        summary,
        details: "",
        parameters: &[],
        body: Body::None,
        answer,
    }
}

/// An operation that does something.
pub(crate) const fn post(
    subject: &'static str,
    summary: &'static str,
    body: Body,
    answer: Answer,
) -> Operation {
    Operation { verb: Verb::Post, body, ..get(subject, summary, answer) }
}

/// An operation that takes something away.
pub(crate) const fn delete(subject: &'static str, summary: &'static str, answer: Answer) -> Operation {
    Operation { verb: Verb::Delete, ..get(subject, summary, answer) }
}

impl Operation {
    pub(crate) const fn access(self, access: Access) -> Operation {
        Operation { access, ..self }
    }

    pub(crate) const fn details(self, details: &'static str) -> Operation {
        Operation { details, ..self }
    }

    pub(crate) const fn parameters(self, parameters: &'static [Parameter]) -> Operation {
        Operation { parameters, ..self }
    }
}
