package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func newImageIOCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "io FILE",
		Short: "Read and write an image, one command a line on standard input",
		Long: `Carry out commands on an image, one a line on standard input. The first that fails ends it, with the number
of the line; what was done before stays. Empty lines and what follows a # at the beginning of a line are
skipped.

  read OFF LEN         print the bytes in hexadecimal
  read OFF LEN BYTE    fail unless each byte is BYTE
  write OFF LEN BYTE   write BYTE everywhere
  zero OFF LEN         make it read as zeros; what was allocated stays so
  discard OFF LEN      make it read as zeros; whole clusters are freed
  flush                make everything written durable
  snapshot NAME        take a snapshot
  goto NAME            make the disk what it was at a snapshot
  delete NAME          delete a snapshot

OFF and LEN are sizes; BYTE is from 0 to 255 or 0xff. NAME is all that follows on the line; an ID is not looked
for.`,
		Example: `  printf 'write 0 64K 0xaa\nsnapshot a\nwrite 0 4K 0xbb\ngoto a\nread 0 64K 0xaa\n' | csi-qcow2 image io disk.qcow2`,
		Args:    takes("FILE"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			s := ioSession{path: args[0], out: cmd.OutOrStdout(), buffer: make([]byte, copyChunk)}
			if s.img, err = openImage(s.path, true); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, s.close()) }()
			return s.run(cmd.Context(), cmd.InOrStdin())
		},
	}
}

// ioSession carries out the commands of `image io`. Until one of them changes the image it is open for reading.
type ioSession struct {
	path   string
	img    *qcow2.Image // nil if it could not be opened again
	writes bool         // it is open for writing
	out    io.Writer
	buffer []byte
}

func (s *ioSession) close() error {
	if s.img == nil {
		return nil
	}
	return s.img.Close()
}

// write opens the image for writing.
func (s *ioSession) write() error {
	if s.writes {
		return nil
	}
	if err := s.img.Close(); err != nil {
		return err
	}
	s.img = nil
	img, err := openImage(s.path, false)
	if err != nil {
		return err
	}
	s.img, s.writes = img, true
	return nil
}

func (s *ioSession) run(ctx context.Context, in io.Reader) error {
	lines := readLines(ctx, in)
	for number := 1; ; number++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case line, more := <-lines:
			if !more {
				return nil
			}
			if err := s.line(ctx, line); err != nil {
				return fmt.Errorf("line %d: %w", number, err)
			}
		}
	}
}

type inputLine struct {
	text string
	err  error
}

// readLines sends the lines of in until it ends or ctx does. A read from a terminal cannot be
// interrupted: then the goroutine stays, and ends with the process.
func readLines(ctx context.Context, in io.Reader) <-chan inputLine {
	lines := make(chan inputLine)
	send := func(l inputLine) bool {
		select {
		case lines <- l:
			return true
		case <-ctx.Done():
			return false
		}
	}
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(in)
		for scanner.Scan() {
			if !send(inputLine{text: scanner.Text()}) {
				return
			}
		}
		if err := scanner.Err(); err != nil {
			send(inputLine{err: err})
		}
	}()
	return lines
}

// line carries out one line.
func (s *ioSession) line(ctx context.Context, l inputLine) error {
	text := strings.TrimSpace(l.text)
	if l.err != nil || text == "" || text[0] == '#' {
		return l.err
	}
	verb, rest, _ := strings.Cut(text, " ")
	if err := s.do(ctx, verb, strings.TrimSpace(rest)); err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	return nil
}

func (s *ioSession) do(ctx context.Context, verb, rest string) error {
	switch verb {
	case "read", "write", "zero", "discard":
		return s.transfer(ctx, verb, rest)
	case "flush":
		if rest != "" {
			return errors.New("takes no argument")
		}
		return s.img.Flush()
	}
	change, ok := map[string]func(context.Context, *qcow2.Image, string) error{
		"snapshot": createSnapshot,
		"goto":     byName(gotoSnapshot),
		"delete":   byName(deleteSnapshot),
	}[verb]
	switch {
	case !ok:
		return errors.New("no such command; see csi-qcow2 image io --help")
	case rest == "":
		return errors.New("wants NAME")
	}
	if err := s.write(); err != nil {
		return err
	}
	return change(ctx, s.img, rest)
}

// byName makes a change of the snapshot that has a name.
func byName(change changeOfSnapshot) func(context.Context, *qcow2.Image, string) error {
	return func(ctx context.Context, img *qcow2.Image, name string) error {
		selector, err := findSnapshot(img, name, false)
		if err != nil {
			return err
		}
		return change(ctx, img, selector)
	}
}

// transfer carries out a command that has an offset and a length, in pieces of at most the buffer.
func (s *ioSession) transfer(ctx context.Context, verb, rest string) error {
	off, n, value, err := parseTransfer(verb, strings.Fields(rest))
	if err == nil && verb != "read" {
		err = s.write()
	}
	if err != nil {
		return err
	}
	switch verb {
	case "zero":
		return s.img.WriteZeroes(off, n)
	case "discard":
		return s.img.Discard(off, n)
	}
	if off > s.img.Size()-n {
		return fmt.Errorf("%d bytes at %d: %w (the disk has %d)", n, off, qcow2.ErrOutOfRange, s.img.Size())
	}
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		piece := s.buffer[:min(end-off, int64(len(s.buffer)))]
		if err := s.piece(verb, piece, off, value); err != nil {
			return err
		}
		off += int64(len(piece))
	}
	return nil
}

func (s *ioSession) piece(verb string, p []byte, off int64, value *byte) error {
	if verb == "write" {
		for i := range p {
			p[i] = *value
		}
		_, err := s.img.WriteAt(p, off)
		return err
	}
	if err := readFull(s.img, p, off); err != nil {
		return err
	}
	if value == nil {
		return hexDump(s.out, p, off)
	}
	for i, b := range p {
		if b != *value {
			return fmt.Errorf("the byte at %d (%#x) is %#02x, not %#02x", off+int64(i), off+int64(i), b, *value)
		}
	}
	return nil
}

// parseTransfer reads OFF LEN [BYTE]: write must have a byte, read may have one.
func parseTransfer(verb string, fields []string) (off, n int64, value *byte, err error) {
	usage := map[string]string{"read": "OFF LEN [BYTE]", "write": "OFF LEN BYTE"}[verb]
	least, most := 2, 3
	switch verb {
	case "write":
		least = 3
	case "zero", "discard":
		usage, most = "OFF LEN", 2
	}
	if len(fields) < least || len(fields) > most {
		return 0, 0, nil, fmt.Errorf("wants %s", usage)
	}
	if off, err = parseSize(fields[0]); err != nil {
		return 0, 0, nil, err
	}
	if n, err = parseSize(fields[1]); err != nil {
		return 0, 0, nil, err
	}
	if len(fields) == 3 {
		b, err := parseNumber(fields[2])
		if err != nil || b > math.MaxUint8 {
			return 0, 0, nil, fmt.Errorf("%q is not a byte: 0 to 255, or 0xff", fields[2])
		}
		value = new(byte(b))
	}
	return off, n, value, nil
}

// hexDump writes p, the data at off, sixteen bytes a line.
func hexDump(w io.Writer, p []byte, off int64) error {
	out := bufio.NewWriter(w)
	for len(p) > 0 {
		row := p[:min(len(p), 16)]
		text := make([]byte, len(row))
		for i, b := range row {
			text[i] = '.'
			if b >= ' ' && b <= '~' {
				text[i] = b
			}
		}
		fmt.Fprintf(out, "%08x  %-47s  |%s|\n", off, fmt.Sprintf("% x", row), text)
		p, off = p[len(row):], off+int64(len(row))
	}
	return out.Flush()
}
