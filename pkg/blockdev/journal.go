package blockdev

import (
	"fmt"

	"k8s.io/klog/v2"
)

// A kernel before Linux 6.9 does not hand out again what a server had read and not answered when it died. But it waits for
// the answer, from whoever has the connection. So the messages are the journal: the holder keeps their memory, and the
// next server finds in it all that it has to answer. To note a request takes two or three stores, no system call.
//
// A process ends between two instructions, or behind a system call: what a read(2) has begun is finished. Hence:
//
//   - No request is lost. The message that is read into has length 0 before, and the kernel itself writes the length. A
//     request that moves to a small message is there, its length last, before the large one is cleared.
//   - An answered request is never carried out again, and so cannot undo a later one: its outcome is noted before the
//     reply is sent, and with an outcome only the reply is sent again. The kernel ignores a reply that it has had: the
//     number of a request is never used twice.
//   - What was carried out, perhaps in part, and not answered is carried out again. Whatever ran beside it was not
//     ordered against it. The reply overwrites the data of a WRITE only when the outcome is noted.
//   - A request that is found twice, because it was being moved, is carried out and answered twice: nothing new is read
//     before all that is found has been answered, so nothing can come between.
//   - I/O that the dead process had begun is over: the locks on the image outlast it, and the next server waits for them.
//
// On other kernels the same memory is nobody's but the server's.

// journalVersion is that of the messages' layout: another engine may find them.
const journalVersion = 1

// replay answers what an earlier server had read and not answered.
func (s *server) replay() error {
	redone, again := 0, 0
	for i := range smallMessages + largeMessages {
		m := s.messages.at(i)
		switch {
		case *m.outcome() != 0:
			again++
			if n := int(uint32(*m.outcome())); n > m.room() {
				return fmt.Errorf("journal: a reply of %d bytes", n)
			}
			if err := s.conn.send(m.reply()); err != nil {
				return fmt.Errorf("reply again: %w", err)
			}
		case *m.length() != 0:
			redone++
			if n := int(*m.length()); n > len(m.request()) || !m.held().valid() {
				return fmt.Errorf("journal: malformed request of %d bytes", n)
			}
			if err := s.answer(m); err != nil {
				return err
			}
		}
		m.clear()
	}
	klog.InfoS("Answered what an earlier server had read", "device", s.options.Name, "carriedOut", redone, "onlyAnswered", again)
	return nil
}
