package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// signature is what files of a format begin with, or have somewhere else.
type signature struct {
	format string // as qemu-img calls it, if it knows it
	at     int64  // from the end of the file if it is negative
	magic  string
}

// signatures are of what is no raw disk, as far as it has one.
func signatures() []signature {
	return []signature{
		{"qcow2", 0, "QFI\xfb"},
		{"vmdk", 0, "KDMV"},
		{"vmdk", 0, "COWD"},
		{"vhdx", 0, "vhdxfile"},
		{"vpc", 0, "conectix"},
		{"vpc", -512, "conectix"},
		{"vdi", 64, "\x7f\x10\xda\xbe"},
		{"luks", 0, "LUKS\xba\xbe"},
		{"qed", 0, "QED\x00"},
		{"parallels", 0, "WithoutFreeSpace"},
		{"parallels", 0, "WithouFreSpacExt"},
		{"bochs", 0, "Bochs Virtual HD Image"},
		{"cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop"},
		{"dmg", -512, "koly"},
		{"gzip", 0, "\x1f\x8b\x08"},
		{"xz", 0, "\xfd7zXZ\x00"},
		{"zstd", 0, "\x28\xb5\x2f\xfd"},
		{"bzip2", 0, "BZh"},
		{"lz4", 0, "\x04\x22\x4d\x18"},
		{"zip", 0, "PK\x03\x04"},
		{"tar", 257, "ustar"},
	}
}

// foreignFormat returns the format that a file of size bytes seems to have, "" if it is likely a raw disk.
func foreignFormat(f io.ReaderAt, size int64) (string, error) {
	for _, s := range signatures() {
		at := s.at
		if at < 0 {
			at += size
		}
		b := make([]byte, len(s.magic))
		if at < 0 || at > size-int64(len(b)) {
			continue
		}
		if err := readFull(f, b, at); err != nil {
			return "", err
		}
		if string(b) == s.magic {
			if s.format == "qcow2" && size >= 8 {
				return qcowVersion(f)
			}
			return s.format, nil
		}
	}
	head := make([]byte, min(size, 2048))
	if err := readFull(f, head, 0); err != nil {
		return "", err
	}
	if isDescriptor(head) {
		return "vmdk", nil
	}
	return "", nil
}

func qcowVersion(f io.ReaderAt) (string, error) {
	var b [4]byte
	if err := readFull(f, b[:], 4); err != nil {
		return "", err
	}
	if binary.BigEndian.Uint32(b[:]) == 1 {
		return "qcow", nil
	}
	return "qcow2", nil
}

// isDescriptor tells whether text is the beginning of a VMDK's descriptor: comments, and then its version.
func isDescriptor(text []byte) bool {
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' {
			return bytes.HasPrefix(line, []byte("version="))
		}
	}
	return false
}

// refuseForeign returns an error that says what to do with a file that seems not to be a raw disk.
func refuseForeign(path, format string) error {
	what := fmt.Sprintf("%s seems to be no raw disk, but a file of format %s", printable(path), format)
	switch format {
	case "":
		return nil
	case "gzip", "xz", "zstd", "bzip2", "lz4", "zip", "tar":
		what += ": unpack it first"
	default:
		what += fmt.Sprintf(": convert it, `qemu-img convert -f %s -O qcow2 %s FILE`", format, printable(path))
	}
	return errors.New(what + ". If it is a raw disk that happens to look like that, say so with --raw")
}
